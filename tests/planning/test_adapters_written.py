"""Adapters that we write, for every family: PEFT loads all of it, and the manifest knows what is not in it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from builders import ADAPTER_FAMILIES, inputs_for, load_folder, make_model, perturb
from safetensors.torch import load_file
from torch import Tensor

import acemerge
from acemerge.extract import extract_lora

# What is 2-D beside embeddings, and PEFT has no way to reach: it refuses this module of this model.
LEFT_OUT = {"mamba": "mixer.out_proj.weight"}
TASKS = {"t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}
NO_TASK = ("bert", "roberta", "vit", "clip", "llava", "qwen3_vl_moe")


def _logits(model: torch.nn.Module, family: str) -> list[Tensor]:
    with torch.no_grad():
        outputs = model(**inputs_for(family))
    return [value for name, value in outputs.items() if name.startswith("logits")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ADAPTER_FAMILIES)
def test_peft_loads_all_of_it(family: str, tmp_path: Path) -> None:
    base, tuned, lora, out = (tmp_path / name for name in ("base", "tuned", "lora", "out"))
    make_model(family).save_pretrained(base)
    perturb(make_model(family), seed=3).save_pretrained(tuned)
    report = extract_lora(tuned, base, 2, lora)
    acemerge.merge(base, [lora], "average", out=out)

    # PEFT has every tensor of the file in a place, and makes of them what we make of them.
    cls = type(make_model(family))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(base), lora).eval()
    assert not [w for w in said if "missing" in str(w.message) or "not match" in str(w.message)]
    placed = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert placed.keys() == load_file(lora / "adapter_model.safetensors").keys()
    merged = cls.from_pretrained(out).eval()
    for found, wanted in zip(_logits(loaded, family), _logits(merged, family), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    unloaded = loaded.merge_and_unload().state_dict()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(unloaded[name], value, rtol=1e-6, atol=1e-6, msg=name)

    # What it lacks of the fine-tune is counted.
    before, after, found = load_folder(base), load_folder(tuned), load_folder(out)
    energy = sum((after[name] - value).square().sum(dtype=torch.float64) for name, value in before.items())
    lacking = sum((after[name] - value).square().sum(dtype=torch.float64) for name, value in found.items())
    assert report.manifest["share_lost"] == pytest.approx(float(lacking / energy), rel=1e-4)
    left_out = {name: record["reason"] for name, record in report.tensors.items() if record["role"] == "linear"}
    left_out = {n: why for n, why in left_out.items() if n not in report.manifest["stored"] and ".experts." not in n}
    assert all(name.endswith(LEFT_OUT.get(family, "nothing")) for name in left_out)
    assert all("not in the adapter, as PEFT puts no LoRA there" in why for why in left_out.values())
    assert bool(left_out) == (family in LEFT_OUT)

    task = json.loads((lora / "adapter_config.json").read_text())["task_type"]
    assert task == (None if family in NO_TASK else TASKS.get(family, "CAUSAL_LM"))
