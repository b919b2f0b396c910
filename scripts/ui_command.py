"""The command `ether ui`: the studio in a browser."""

from importlib.util import find_spec

from ether_diffusion.scripts import command_options as told


def ui(options: told.Ui) -> None:
    """Serve the studio until it is interrupted."""
    if find_spec("gradio") is None:
        raise ValueError('the studio needs Gradio; install it with pip install "ether-diffusion[ui]"')
    try:
        folder = options.folder.expanduser()
    except RuntimeError:
        raise ValueError(
            f"there is no home folder here for {options.folder}; say with --folder where to keep all"
        ) from None
    from ether_diffusion.ui.server import read_login, serve

    serve(
        folder,
        base=options.base,
        port=options.port,
        listen=options.listen,
        login=None if options.auth is None else read_login(options.auth),
        open_browser=options.open,
    )
