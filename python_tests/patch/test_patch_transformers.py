"""Patched models of transformers compute what they computed: outputs, hidden states and gradients against float64."""

from __future__ import annotations

import patch_samples as samples
import pytest
import torch

import stackbert_kernels as sbk

EPS = torch.finfo(torch.float32).eps


def assert_same(patched: dict, unpatched: dict, exact: dict, at: torch.Tensor | None) -> None:
    """Each tensor is as near to float64 as the unpatched model's, up to 3 times its largest error and two ulps of the largest value of its
    kind: sums in another order. Gradients begin with the loss's, up to 1/2 in size, and may cancel. `at` = the tokens at which [B, S, ...]
    tensors are compared."""
    assert patched.keys() == unpatched.keys() == exact.keys()
    for gradients in (False, True):
        names = [name for name in exact if name.startswith("d ") == gradients]
        ulps = 2 * EPS * max(0.5 * gradients, *(exact[name].abs().max().item() for name in names))
        for name in names:
            tensors = [of[name] for of in (patched, unpatched, exact)]
            if at is not None and not gradients and tensors[0].dim() >= 2 and tensors[0].shape[:2] == at.shape:
                tensors = [t[at] for t in tensors]
            ours, theirs = ((t.double() - tensors[2]).abs().max() for t in tensors[:2])
            assert ours <= 3 * theirs + ulps, f"{name}: error {ours:.2e}, unpatched {theirs:.2e} (+ {ulps:.1e})"


@pytest.mark.parametrize("unpad", [False, True], ids=["padded", "unpad"])
@pytest.mark.parametrize("name", samples.CLASSES)
def test_the_same_outputs_and_gradients(name, unpad):
    """In evaluation and in training without dropout; unpad changes what stands at padding."""
    model = samples.model(name)
    if name.endswith("ForMultipleChoice") and not name.startswith("Electra") and model.base_model.pooler is None:
        pytest.skip("this transformers gives the head no pooler")
    patched, exact = samples.twin(model), samples.twin(model).double()
    report = sbk.patch(patched, unpad=unpad)
    assert {"attention", "add_norm", "gelu", "embeddings"} <= {row.part for row in report.patched}
    for training in (False, True):
        for made in (model, patched, exact):
            made.train(training)
        for padding in ("full", "right") if training else samples.PADDING:
            given = samples.batch(name, padding)
            keep = given.get("attention_mask")
            at = keep.view(-1, samples.LONGEST) == 1 if unpad and keep is not None else None
            assert_same(*(samples.results(m, given) for m in (patched, model, exact)), at)
