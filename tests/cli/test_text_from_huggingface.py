"""A text model of a Hugging Face directory, trained as users start it; every process is real."""

from __future__ import annotations

import torch

from tests.helpers.cli import finish, metrics, start_training
from tests.huggingface.text import make
from tests.huggingface.tiny import contents

RUN = """
model: {seq_length: 32}
layers: [1, 2, 1]
sites: {cloud: {pipeline_ranks: 1}}
train: {iterations: 2, global_batch_size: 4, micro_batch_size: 1, eval_interval: 2, warmup_iterations: 0}
"""


def test_weights_go_out_and_in(tmp_path):
    """Everything learns; the embedding of more rows than the tokenizer has ids comes back as large as it was."""
    source, saved, config = tmp_path / "hf", tmp_path / "saved", tmp_path / "run.yaml"
    make(source, "Qwen3", vocab_size=300, rope="llama3", tied=True)
    config.write_text(RUN)
    options = [f"model.hf={source}", f"train.output_dir={tmp_path / 'run'}"]
    code, _, said = finish(start_training(config, *options, f"train.save_hf={source}"))
    assert code == 2 and "is the directory from which the model is loaded" in said
    code, shown, said = finish(start_training(config, *options, f"train.save_hf={saved}"))
    assert code == 0, shown + said
    assert [entry["event"] for entry in metrics(tmp_path / "run")] == ["step", "step", "evaluation"]
    before, after = contents(source), contents(saved)
    assert {name: one.shape for name, one in before.items()} == {name: one.shape for name, one in after.items()}
    assert not any(torch.equal(one, after[name]) for name, one in before.items())
