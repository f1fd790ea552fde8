"""How much memory does a site need to load, and to save, its part of a model?

    python benchmarks/loading_memory.py                      a cloud site of 1 GiB
    python benchmarks/loading_memory.py --gib 13 --folder /scratch/loading      needs twice that on the disk

A cloud process holds the middle layers of a Llama model in bf16. Each way of loading runs in a process of its own, which
builds the module (its weights are there then, with nothing in them) and fills it:

    hf          a Hugging Face directory of the site's tensors, `model.hf`
    megatron    a distributed checkpoint of the site, `train.resume` and `train.load`
    peer        the same by megatron-core's own dist_checkpointing.load and the module's load_state_dict
    save        as hf, then writes a checkpoint: what saving takes besides

Reported is the peak of memory that belongs to the process alone (`RssAnon`: pages of files, which the system takes back when
it needs them, are not counted), sampled every 5 ms, from building on, over the bytes of the site's parameters. 1 is what
nobody can do without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch

HIDDEN, FFN, HEADS, VOCABULARY = 4096, 11008, 32, 32000
LAYER_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN + 2 * HIDDEN)
WAYS = ("hf", "megatron", "peer", "save")


class Peak:
    """Samples RssAnon of this process in a thread; `over` is the highest value above the one at the start, in bytes."""

    def __init__(self) -> None:
        self._start, self.over, self._stop = rss_anon(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.over = max(self.over, rss_anon() - self._start)

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return max(self.over, rss_anon() - self._start)


def rss_anon() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell RssAnon; Linux does")


def write_directory(path: Path, layers: int) -> None:
    """A Hugging Face directory with the middle layers alone, as `ldt convert split` makes one; each layer has one content."""
    from ldt_schedules.megatron.huggingface.directory import CONFIG, INDEX
    from ldt_schedules.megatron.huggingface.safetensors_file import TensorInfo, write_safetensors

    path.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers + 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
    }
    (path / CONFIG).write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{one}_proj": (HIDDEN, HIDDEN) for one in "qkvo"},
        **{f"mlp.{one}_proj": (FFN, HIDDEN) for one in ("gate", "up")},
        "mlp.down_proj": (HIDDEN, FFN),
        **{name: (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")},
    }
    names = {f"model.layers.{layer}.{one}.weight": one for layer in range(layers + 2) for one in shapes}
    ends = {name: (VOCABULARY, HIDDEN) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    ends["model.norm.weight"] = (HIDDEN,)  # type: ignore[assignment]
    held = [name for name in names if 0 < int(name.split(".")[2]) <= layers]
    content = {one: torch.randn(shape).to(torch.bfloat16) for one, shape in shapes.items()}
    with write_safetensors(
        path / "middle.safetensors", {n: TensorInfo(shapes[names[n]], "BF16") for n in held}
    ) as writer:
        for name in held:
            writer.put(name, content[names[name]])
    elsewhere = {name: "edge.safetensors" for name in (*names, *ends) if name not in held}
    index = {"weight_map": {**dict.fromkeys(held, "middle.safetensors"), **elsewhere}}
    (path / INDEX).write_text(json.dumps(index))


def measure(way: str, folder: Path, layers: int) -> dict[str, Any]:
    """In a process of its own."""
    import patches
    from ldt_schedules.comm.ports import free_ports
    from ldt_schedules.megatron import world
    from ldt_schedules.topology import Site
    from ldt_schedules.training.config import TrainConfig
    from ldt_schedules.training.huggingface_model import with_sizes
    from ldt_schedules.training.model import build_module, transformer_config
    from ldt_schedules.training.vocabulary import Vocabulary

    warnings.simplefilter("ignore")
    content = {"model": {"hf": str(folder / "hf"), "precision": "bf16", "seq_length": 128}}
    content = {**with_sizes(content), "layers": [1, layers, 1], "sites": {"cloud": {"pipeline_ranks": 1}}}
    config = TrainConfig.model_validate({**content, "data": {"tokenizer": "bytes"}})
    place = config.topology.place(Site.CLOUD, 0)
    patches.apply_all()
    (port,) = free_ports(1)
    world.open_site(config.topology, place, world.Address(host="127.0.0.1", port=port), 600, 1)
    whole = transformer_config(config, config.topology, Site.CLOUD)
    peak, start = Peak(), time.perf_counter()
    module = build_module(config, whole, place, Vocabulary(VOCABULARY), first_weights=way in ("hf", "save"))
    size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    _fill(way, folder, module)
    return {"way": way, "parameters": size, "peak": peak.stop(), "seconds": time.perf_counter() - start}


def _fill(way: str, folder: Path, module: torch.nn.Module) -> None:
    from megatron.core import dist_checkpointing

    from ldt_schedules.megatron.checkpoints.site_directory import Manifest
    from ldt_schedules.megatron.checkpoints.site_saver import SiteSaver
    from ldt_schedules.megatron.checkpoints.site_state import Trainee, load_state
    from ldt_schedules.megatron.checkpoints.torch_dist import open_checkpoint
    from ldt_schedules.megatron.checkpoints.verifying import verify
    from ldt_schedules.megatron.chunks import bare_module

    step = folder / "site" / "iter_0000001"
    if way == "save":
        SiteSaver(step.parent, Manifest("cloud", 0, "run", {})).save(Trainee(module), 1, 0)
    elif way == "megatron":
        verify(step)
        load_state(Trainee(module), open_checkpoint(step))
    elif way == "peer":
        inner = bare_module(module)
        loaded = dist_checkpointing.load({"model": inner.sharded_state_dict()}, str(step))
        inner.load_state_dict(loaded["model"], strict=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="of the site's parameters, GiB, about")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object a way")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    layers = max(1, round(given.gib * 2**30 / LAYER_BYTES))
    if given.measure:
        print(json.dumps(measure(given.measure, given.folder, layers)))
        return
    folder = given.folder or Path(tempfile.mkdtemp())
    try:
        write_directory(folder / "hf", layers)
        for way in ("hf", "save", "megatron", "peer"):
            print(_line(_in_a_process(way, folder, given.gib), given.json), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _in_a_process(way: str, folder: Path, gib: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", way, "--folder", str(folder), "--gib", str(gib)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    if done.returncode:
        return {"way": way, "failed": done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _line(result: dict[str, Any], as_json: bool) -> str:
    if as_json:
        return json.dumps(result)
    if "failed" in result:
        return f"{result['way']:<10} did not end: {result['failed']}"
    ratio, gib = result["peak"] / result["parameters"], result["parameters"] / 2**30
    return f"{result['way']:<10} {gib:6.2f} GiB of parameters, peak {ratio:.3f} times that, {result['seconds']:.1f} s"


if __name__ == "__main__":
    main()
