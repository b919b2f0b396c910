"""What a server is told, on a command line or in a serve.yaml."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ether_diffusion.options import Count, Options, option

Dtype = Literal["float32", "float16", "bfloat16"]


class Serve(Options):
    """Draw for many over HTTP, by OpenAI's images API: one base, adapters by name, mixed in a batch."""

    base: str = option("tiny_world_2", "folder, hub id or file of the base (tiny_world_2)")
    adapters: str | None = option(
        None, "folder of adapter folders, by whose names requests take them; or s3://…, what fsspec opens"
    )
    host: str = option("127.0.0.1", "address to listen at; others than this machine's need --api_keys")
    port: Annotated[int, Field(ge=1, le=65535)] = option(8000, "to listen at (8000)")
    api_keys: Path | None = option(None, "file of the hashes of keys; without it this machine alone may ask")
    new_key: str | None = option(None, "make a key for this name, write its hash to --api_keys, and stop")
    max_per_key: Count = option(16, "pictures of a key that are drawn or wait at a time (16)")
    max_rows: Count = option(8, "pictures that are drawn together (8)")
    max_waiting: Count = option(64, "further ones that wait, until 429 is answered (64)")
    num_slots: Count = option(16, "adapters whose factors are kept ready (16)")
    max_side: Count | None = option(None, "of a picture in px (twice what the base was trained at)")
    max_steps: Count = option(100, "of a picture (100)")
    device: str | None = option(None, "cpu, cuda, … (the accelerator if there is one)")
    dtype: Dtype | None = option(None, "(float32 on the CPU, else float16)")
    ray: bool = option(False, "draw on a Ray cluster: that of RAY_ADDRESS, or one that is started here")
    min_replicas: Count = option(1, "with --ray, how many draw at least (1)")
    max_replicas: Count = option(1, "with --ray, how many draw at most, as the queue asks (1)")

    def _contradictions(self) -> Iterator[str]:
        if self.min_replicas > self.max_replicas:
            yield f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}; raise that"
        if self.max_replicas > 1 and not self.ray:
            yield f"max_replicas={self.max_replicas} has no effect without --ray; give that, too"
