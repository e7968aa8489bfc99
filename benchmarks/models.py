"""The page of the types of models: each is taken through every kind of merge, tiny, and built at its published size.

    .venv/bin/python benchmarks/models.py

Writes docs/models.md; a few minutes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
sys.path.append(str(ROOT / "tests" / "support"))

from builders import FAMILIES  # noqa: E402
from model_types import PUBLISHED, try_out  # noqa: E402

_HEAD = """# Models

Every type of model that was tried, with the transformers and PEFT of `constraints.txt`. *Built*: the architecture at
its published size, whose modules then say what each tensor is; for any other, names and shapes say. The other columns
are of tiny random models. *Full*: a fine-tune of all weights is merged, and the output loads as that fine-tune.
*LoRA*: an adapter of every linear layer that PEFT wrote is merged, and the output is what PEFT's own `merge_and_unload`
gives. *Adapter*: what `extract-lora` writes of a fine-tune is loaded by PEFT, with the fine-tune's values in every
layer that the adapter holds. All to 1e-5.

An expert need not be stored as its base is. Names may have a wrapper's parts in front or within (`module.`,
`_orig_mod.`, `_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`, `_forward_module.`, `pretrained_model.`); the
experts of a mixture may lie in one tensor or in a matrix each; a body may be without its prefix, a head tied or not.
The output has the base's layout. Of batch norms the running statistics are averaged and the largest counter is kept.
The dense modules that sentence-transformers puts behind a model are merged as linear layers. One `.safetensors` file is
a model, too: names and shapes then say what its tensors are.

The table is written by `python benchmarks/models.py`; a test holds rows of it against what it gives.

| architecture | built | full | LoRA | adapter |
|---|---|---|---|---|
"""


def line(architecture: str, folder: Path) -> str:
    """The row of an architecture."""
    return f"| {architecture} | {' | '.join(try_out(architecture, folder))} |"


def main() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tried = dict.fromkeys([*PUBLISHED, *(name for name, _, _ in FAMILIES.values())])
    lines = []
    for architecture in sorted(tried):
        with tempfile.TemporaryDirectory() as folder:
            lines.append(line(architecture, Path(folder)))
        print(lines[-1], file=sys.stderr, flush=True)
    PAGE.write_text(_HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
