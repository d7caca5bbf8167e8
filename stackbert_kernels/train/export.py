"""The result of a run as a transformers directory with its tokenizer."""

from __future__ import annotations

import importlib.util
import shutil

from stackbert_kernels.data.prepare import tokenizer
from stackbert_kernels.data.tokenizer import SPECIAL
from stackbert_kernels.model.bert import Bert
from stackbert_kernels.model.twins import why_no_twin
from stackbert_kernels.train.console import Console
from stackbert_kernels.train.run_directory import Run

LAST = "config.json"  # its presence means that the export is whole


def exported(run: Run) -> bool:
    return (run.model / LAST).exists()


def exportable(run: Run, console: Console) -> bool:
    """Whether RUN/model can be written here; says in one line why not."""
    weights = f"the weights are in {run.checkpoints / f'step-{run.config.steps}'}"
    if importlib.util.find_spec("transformers") is None:
        console.line(f"no {run.model}: pip install transformers, then give the same command again; {weights}")
        return False
    reason = why_no_twin(run.config.model)
    if reason is not None:
        console.line(f"no {run.model}: {reason}; {weights}")
        return False
    return True


def export(run: Run, model: Bert) -> None:
    """Writes RUN/model, config.json last."""
    import transformers

    from stackbert_kernels.model.hf import to_transformers

    temporary = run.directory / ".model.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    transformers.logging.disable_progress_bar()
    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    pieces = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(run.data), model_max_length=run.config.model.max_position, **names
    )
    to_transformers(model, pad_token_id=pieces.pad_token_id).eval().to("cpu").save_pretrained(temporary)
    pieces.save_pretrained(temporary)
    run.model.mkdir(exist_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == LAST):
        path.replace(run.model / path.name)
    temporary.rmdir()
