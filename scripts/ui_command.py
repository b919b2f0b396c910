"""The command `ether ui`: the studio in a browser."""

import argparse
from importlib.util import find_spec
from pathlib import Path

# Gradio and the library are imported inside the command: `ether --help` must not wait for them.


def add_ui_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ui to the commands of `ether`."""
    parser = commands.add_parser(
        "ui", help="open the studio in a browser: train, draw and compare without commands"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("~/ether-studio"),
        help="where adapters, pictures and runs are kept (~/ether-studio)",
    )
    parser.add_argument("--base", default="tiny_world", help="folder or hub id of the base (tiny_world)")
    parser.add_argument("--port", type=int, help="of the page (the first free one from 7860)")
    parser.add_argument(
        "--listen", action="store_true", help="let other machines in, too; needs --auth (this machine only)"
    )
    parser.add_argument(
        "--auth",
        metavar="NAME:PASSWORD",
        help="ask for a login; @FILE reads it from the first line of a file",
    )
    parser.add_argument("--open", action="store_true", help="open the page in a new tab")
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    if find_spec("gradio") is None:
        raise ValueError('the studio needs Gradio; install it with pip install "ether-diffusion[ui]"')
    try:
        folder = arguments.folder.expanduser()
    except RuntimeError:
        raise ValueError(
            f"there is no home folder here for {arguments.folder}; say with --folder where to keep all"
        ) from None
    from ether_diffusion.ui.server import ServerSettings, read_login, serve

    serve(
        ServerSettings(
            folder=folder,
            base=arguments.base,
            port=arguments.port,
            listen=arguments.listen,
            login=None if arguments.auth is None else read_login(arguments.auth),
            open_browser=arguments.open,
        )
    )
