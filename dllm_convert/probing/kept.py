"""What is measured of a base that is to stay: does it go on from its cache, and from copies of it?

Nothing of it is opened. What a strictly causal draft asks is that several tokens behind a cache are
what they are in the whole text, that a copy of the cache is one, and that noisy rows behind it can
be trained.
"""

from __future__ import annotations

from typing import Any

import torch

from dllm_convert.diffusion.cached import CleanReader, NoisyRows, noisy_logits
from dllm_convert.modeling.published.behind import branched
from dllm_convert.modeling.published.gated import adapter_parameters
from dllm_convert.probing.instance import Instance, text
from dllm_convert.probing.measure import KEPT, LENGTH, Answer, ask, close, reload
from dllm_convert.probing.report import Finding

_READ, _NEXT = 11, 9
"""Tokens that are read first, more than a window or a convolution, and tokens behind them."""
_DRAFT = 4


def measure_kept(instance: Instance) -> list[Finding]:
    """Put every question whose answer an adapter beside a kept base depends on."""
    base = instance.base
    questions = (
        ("goes-on", lambda: goes_on(base)),
        ("copies", lambda: copies(base)),
        ("rolls-back", lambda: rolls_back(base)),
        ("beside-base", lambda: beside_base(instance)),
    )
    findings = [ask(name, KEPT, question) for name, question in questions]
    return [*findings, reload(instance, instance.opened(causal=True), "reload-base", KEPT)]


@torch.no_grad()
def goes_on(base: Any) -> Answer:
    """Ask whether tokens behind a cache are what they are in the whole text."""
    tokens = text(LENGTH, 20)[None]
    whole = base(tokens, use_cache=False).logits
    differences, cache, first = [], None, 0
    for last in (_READ, _READ + _NEXT, _READ + _NEXT + 1, LENGTH):
        output = base(tokens[:, first:last], past_key_values=cache, use_cache=True)
        differences.append(output.logits - whole[:, first:last])
        cache, first = output.past_key_values, last
    return close(differences, whole, "behind its cache it computes something else")


@torch.no_grad()
def copies(base: Any) -> Answer:
    """Ask whether rows go on from a copy of one cache, and leave what was copied alone."""
    tokens, other = text(_READ + _NEXT, 21), text(_READ + _NEXT, 22)
    other = torch.cat([tokens[:_READ], other[_READ:]])
    pair = torch.stack([tokens, other])
    whole = base(pair, use_cache=False).logits
    kept = base(tokens[None, :_READ], use_cache=True).past_key_values
    differences = []
    for order in ([0, 1], [1, 0]):
        twin = branched(kept, torch.zeros(2, dtype=torch.long))
        found = base(pair[order, _READ:], past_key_values=twin, use_cache=True).logits
        differences.append(found - whole[order, _READ:])
    return close(differences, whole, "from a copy of its cache it computes something else")


@torch.no_grad()
def rolls_back(base: Any) -> Answer:
    """Ask whether a cache that says it can be cropped is the one from before.

    One that says it cannot, because of a recurrent state, needs no cropping: see
    `modeling.published.behind`.
    """
    tokens, other = text(LENGTH, 23)[None], text(LENGTH, 24)[None]
    whole = base(tokens, use_cache=False).logits
    cache = base(tokens[:, :_READ], use_cache=True).past_key_values
    if not getattr(cache, "is_croppable", False):
        return True, "recurrent states: known tokens are run again", ""
    differences, first = [], _READ
    for count in (3, 1, 2):
        cache.activate_past_recording()
        # Of a draft the first tokens hold, and the others do not.
        draft = torch.cat([tokens[:, first : first + count], other[:, :6]], 1)
        found = base(draft, past_key_values=cache, use_cache=True).logits[:, :count]
        differences.append(found - whole[:, first : first + count])
        cache.crop(-6)
        first += count
    output = base(tokens[:, first:], past_key_values=cache, use_cache=True).logits
    differences.append(output - whole[:, first:])
    return close(differences, whole, "rolled back its cache is another one")


def beside_base(instance: Instance) -> Answer:
    """Ask whether an adapter acts on noisy tokens alone, and can be trained behind a cache."""
    model = instance.gated()
    tokens = torch.stack([text(LENGTH, 25), text(LENGTH, 26)])
    noisy = (torch.arange(LENGTH) >= _READ).expand(2, -1)
    with torch.no_grad():
        stock = instance.base(tokens, use_cache=False).logits
        clean = model(tokens, use_cache=False).logits
        # Rows whose drafts begin at different places, masks among them.
        masked = tokens.clone()
        masked[:, _READ + 1 :: 2] = model.config.mask_token_id
        found = model(masked, noisy=noisy, use_cache=False).logits
    if not torch.equal(clean, stock):
        return False, "without noise it is not the base", "to the bit"
    passed, measured, detail = close(
        [found[:, :_READ] - stock[:, :_READ]], stock, "a clean token sees noise"
    )
    if not passed:
        return passed, measured, detail
    still = int(((found - stock)[:, _READ:].abs().amax(-1) == 0).sum())
    if still:
        return False, f"{still} noisy tokens are the base's", "an adapter does not act on them"
    behind = _behind(model, masked, noisy)
    passed, measured, detail = close(
        [behind - found[:, _READ:]], found, "behind a cache noisy tokens are others"
    )
    if not passed:
        return passed, measured, detail
    return _trains(model, tokens)


@torch.no_grad()
def _behind(model: Any, tokens: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
    """Return logits of noisy tokens, (rows, noisy, vocab), whose clean ones are in a cache."""
    reader = CleanReader(model, tokens)
    reader.go_to(_READ)
    beside = reader.behind(torch.arange(len(tokens)))
    logits: torch.Tensor = model(tokens[:, _READ:], noisy=noisy[:, _READ:], **beside).logits
    return logits


def _trains(model: Any, tokens: torch.Tensor) -> Answer:
    """Ask whether gradients of noisy rows reach every tensor of the adapter."""
    trained = adapter_parameters(model)
    for weight in trained.values():
        weight.requires_grad_(True)
    reader = CleanReader(model.train(), tokens)
    total = torch.zeros(())
    for place in (_READ, _READ + _DRAFT):
        reader.go_to(place)
        rows = torch.tensor([0, 1, 1])
        drafts = torch.full((3, _DRAFT), int(model.config.mask_token_id))
        at = torch.arange(3 * _DRAFT)
        behind = NoisyRows(place, rows, drafts, at)
        total = total + noisy_logits(model, behind, reader.behind(rows)).float().logsumexp(-1).sum()
    total.backward()  # type: ignore[no-untyped-call]
    model.eval()
    grads = {name: weight.grad for name, weight in trained.items()}
    wrong = [n for n, g in grads.items() if g is None or not g.isfinite().all() or not g.any()]
    count = f"{len(grads) - len(wrong)} of {len(grads)} tensors of an adapter have gradients"
    return not wrong, count, f"none for {wrong[0]}" if wrong else ""
