"""Lossless decoding: the text is the verifier's own, token for token; drafts make it faster.

One forward verifies what the last one drafted and drafts anew behind every prefix that may be
accepted: clean tokens are read strictly causally and predict what follows them, as in
autoregressive decoding; masks behind them predict the tokens after that one (after Blockwise
parallel decoding, arXiv 1811.03115, and SpecInfer, arXiv 2305.09781, the drafts being the same
model's denoising).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import log
from typing import Any

import torch

from .behind import CacheTreeReader, stands_behind_cache
from .cache import BlockCache
from .canvas import Canvas
from .choosing import make_warpers
from .drafting import LARGEST, MOST_RANK, SURE, DraftPolicy, Tree
from .draws import mixed
from .gated import has_causal_drafts
from .moving import sent
from .options import Decoded, DecodingOptions, Observer
from .rope import final_lengths
from .rules import shape_logits

_CLOSE = 8
"""Two logits are close if fewer than so many of the type's steps lie between them: a forward of
several tokens may round them the other way round than one of a single token."""


class VerifierError(ValueError):
    """Nothing can verify what would be written."""


class Choice:
    """Which token a distribution writes at a position: the likeliest, or the one that is drawn.

    A draw adds Gumbel noise to log-probabilities and takes the largest: the noise belongs to row
    and position, so what is written is the same whatever was drafted, and drafts that see the same
    noise are right as often as the two distributions agree (drafter-invariant speculative decoding,
    arXiv 2408.07978).
    """

    def __init__(
        self, options: DecodingOptions, rows: int, device: torch.device, vocabulary: int
    ) -> None:
        self._options, self._warpers = options, make_warpers(options)
        never = {options.mask_token_id, *options.suppress_tokens}
        # The mask of a gated model need not have a row.
        self._never = sent(sorted(token for token in never if token < vocabulary), device)
        self._generator = torch.Generator(device)
        seeds = options.seeds
        if options.temperature and not seeds:
            seeds = tuple(torch.randint(1 << 62, (rows,)).tolist())
        self._seeds = seeds
        self._noise: dict[tuple[int, int], torch.Tensor] = {}

    def scores(self, logits: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
        """Return what tokens are ranked by, shape (n, vocab), of logits at n (row, position)."""
        logits = logits.float().index_fill(1, self._never, -torch.inf)
        if not self._options.temperature:
            return logits
        empty: Any = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
        warped = self._warpers(empty, logits - logits.amax(-1, keepdim=True)).log_softmax(-1)
        return warped + torch.stack([self._drawn(place, logits) for place in places])

    def _drawn(self, place: tuple[int, int], logits: torch.Tensor) -> torch.Tensor:
        found = self._noise.get(place)
        if found is None:
            row, position = place
            self._generator.manual_seed(mixed(self._seeds[row], position))
            found = logits.new_empty(logits.shape[-1]).exponential_(generator=self._generator)
            found = self._noise[place] = found.log_().neg_()
        return found

    def forget(self, row: int, before: int) -> None:
        """Let the noise of a row's positions before one go."""
        for place in [place for place in self._noise if place[0] == row and place[1] < before]:
            del self._noise[place]


@dataclass
class _Row:
    """One row of the batch.

    Attributes:
        number: Its number in the batch.
        clean: Tokens in the cache; the last known token stands behind them.
        last: That token.
        left: Tokens still wanted.
        candidates: Drafted tokens behind the last one, position by position, the likeliest first.
        sure: Of each position whether the likeliest is sure enough to be denoised beside.
    """

    number: int
    clean: int
    last: int
    left: int
    candidates: list[list[int]] = field(default_factory=list)
    sure: list[bool] = field(default_factory=list)

    def group(self, tree: Tree, mask: int) -> list[int]:
        """The tokens behind the last known one: masks, and drafts that are sure in their place."""
        ranked = zip(self.candidates, self.sure, strict=True) if tree.refines else ()
        known = [among[0] if sure else mask for among, sure in ranked][: tree.masks]
        return known + [mask] * (tree.masks - len(known))

    def nodes(self, tree: Tree) -> list[int]:
        """The tokens of a tree's nodes; where nothing was drafted, any one: it is not accepted."""
        drafted = self.candidates
        return [
            drafted[depth - 1][rank] if 0 < depth <= len(drafted) else self.last
            for _, depth, rank in tree.nodes
        ]

    def accept(
        self, tree: Tree, said: list[int], policy: DraftPolicy
    ) -> tuple[list[int], list[int]]:
        """Follow what the verifier said behind each node as far as it was drafted.

        Returns:
            The nodes that are known now, the last known token first, and the tokens written.
        """
        path, written = [0], []
        while True:
            node, depth = path[-1], len(path)
            token = said[node]
            written.append(token)
            rank = None
            if depth <= len(self.candidates):
                among = self.candidates[depth - 1]
                rank = among.index(token) if token in among else None
                if node == depth - 1:  # still on the chain
                    policy.observe(depth, rank)
            following = None if rank is None else tree.child(node, rank)
            if following is None:
                return path, written
            path.append(following)


class _Reader:
    """Forward passes over a tree of every row, behind the row's clean tokens."""

    def __init__(self, model: Any, canvas: Canvas) -> None:
        self.model, self.canvas = model, canvas
        # Room for all: rows that are ahead of others would lose tokens if the buffers grew.
        self.cache = BlockCache(canvas.tokens.shape[1] + LARGEST.size)
        self.cache.frozen = True
        self.gated = bool(getattr(model, "is_gated", False))
        self.may_be_bare = model.config._attn_implementation == "sdpa"
        self.open_drafts = not has_causal_drafts(model.config)
        self._layouts: dict[Tree, tuple[torch.Tensor, torch.Tensor]] = {}

    def read_prompt(self, rows: list[_Row]) -> None:
        """Run all but the last token of each prompt into the cache, in one forward."""
        width = max(row.clean for row in rows)
        if not width:
            return
        # What a shorter row has past its own tokens is rubbish that nobody sees, and written over.
        columns = self.canvas.index[:width].expand(len(rows), -1)
        seen = (columns[:1, :, None] >= columns[:1, None, :]).expand(len(rows), -1, -1)
        self.cache.put(None, width)
        self._run(self.canvas.tokens[:, :width], columns, seen, columns.new_empty(0))
        self.cache.keep(min(row.clean for row in rows))

    def read(
        self, rows: list[_Row], tree: Tree, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a tree of every row, whose nodes are `tokens` (rows, nodes).

        Returns:
            Logits of the nodes, shape (rows, nodes, vocab), and of the drafted positions behind
            them, shape (rows, groups, drafted, vocab).
        """
        (count, nodes), device = tokens.shape, tokens.device
        if tree not in self._layouts:
            places, local = tree.layout(open_drafts=self.open_drafts)
            self._layouts[tree] = places.to(device), local.to(device)
        places, local = self._layouts[tree]
        starts = [row.clean for row in rows]
        clean = sent(starts, device)[:, None]
        # Columns of the cache are handed out in the order of the forward; a position is another
        # thing, branches stand at the same ones. Each (rows, size).
        index = torch.arange(tree.size, device=device)
        columns, positions = clean + index, clean + places
        shown = tokens.new_full((count, tree.size), self.canvas.options.mask_token_id)
        shown[:, :nodes] = tokens
        if tree.refines:
            mask = self.canvas.options.mask_token_id
            shown[:, nodes:] = sent([row.group(tree, mask) for row in rows], device)
        seen = None
        if tree.size > 1 or min(starts) < max(starts) or not self.may_be_bare:
            keys = torch.arange(max(starts) + tree.size, device=device) - clean
            inside = (keys >= 0) & (keys < tree.size)
            # Who sees which key, (rows, size, keys): all clean ones, and what the tree says.
            among = local[:, keys.clamp(0, tree.size - 1)].transpose(0, 1)
            seen = (keys < 0)[:, None] | (among & inside[:, None])
        wanted = torch.ones(tree.size, dtype=torch.bool)
        if tree.masks and not self.canvas.options.token_shift:
            # Without token shift a group's first mask writes what the node says anyway.
            wanted[nodes :: tree.masks] = False
        at = sent(wanted.nonzero().squeeze(-1).tolist(), device)
        at = (torch.arange(count, device=device)[:, None] * tree.size + at).flatten()
        noisy = (index >= nodes).expand(count, -1) if tree.size > nodes else None
        level = min(starts) == max(starts)
        line = torch.arange(count, device=device)[:, None]
        self.cache.put(None if level else (line, columns), max(starts) + tree.size, starts[0])
        logits = self._run(shown, positions, seen, at, noisy)
        logits = logits.view(count, -1, logits.shape[-1])
        drafted = logits[:, nodes:]
        if tree.groups:
            drafted = drafted.reshape(count, tree.groups, -1, logits.shape[-1])
        return logits[:, :nodes], drafted

    def keep(self, rows: list[_Row], paths: list[list[int]]) -> None:
        """Let the nodes on each row's path be its clean tokens, behind those it has."""
        moves = [
            (line, row.clean + node, row.clean + place)
            for line, (row, path) in enumerate(zip(rows, paths, strict=True))
            for place, node in enumerate(path)
            if node != place
        ]
        if moves:
            layers: list[Any] = self.cache.layers
            for layer in layers:
                for buffer in layer.buffers:
                    line, source, target = sent(moves, buffer.device).unbind(1)
                    buffer[line, :, target] = buffer[line, :, source]
        for row, path in zip(rows, paths, strict=True):
            row.clean += len(path)

    def select(self, rows: list[_Row], kept: list[int]) -> None:
        """Keep only these lines of the cache; `rows` are those that stay."""
        # What is copied are whole buffers, whatever counts as clean.
        self.cache.batch_select_indices(sent(kept, self.canvas.tokens.device))
        self.cache.keep(min(row.clean for row in rows))

    def _run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        seen: torch.Tensor | None,
        at: torch.Tensor,
        noisy: torch.Tensor | None = None,
    ) -> torch.Tensor:
        gate = {"noisy": noisy} if self.gated and noisy is not None else {}
        with final_lengths(self.model, self.canvas.final_lengths):
            output = self.model(
                tokens,
                attention_mask=None if seen is None else seen[:, None],
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_at=at,
                sees_all=seen is None,
                **gate,
            )
        self.canvas.forwards += 1
        logits: torch.Tensor = output.logits
        return logits


def check_lossless(
    model: Any, prompts: torch.Tensor, lengths: list[int], options: DecodingOptions
) -> None:
    """Refuse what cannot be verified: prompts (batch, width), `lengths` tokens long, with masks.

    Raises:
        VerifierError: A prompt is empty or has masks, or the model holds no such verifier.
    """
    if options.verify_with == "base" and not getattr(model, "is_gated", False):
        raise VerifierError(
            'verify_with="base" needs a gated adapter, which leaves the base as it was; this '
            'model\'s weights are its own: verify_with="self"'
        )
    check_prompts(prompts, lengths, options)


def check_prompts(prompts: torch.Tensor, lengths: list[int], options: DecodingOptions) -> None:
    """Refuse prompts (batch, width), `lengths` tokens long, that nothing is written behind.

    Raises:
        VerifierError: One is empty or has masks.
    """
    inside = (
        torch.arange(prompts.shape[1], device=prompts.device)
        < sent(lengths, prompts.device)[:, None]
    )
    masked = ((prompts == options.mask_token_id) & inside).any()
    if 0 in lengths or bool(masked):
        raise VerifierError(
            "verify_with writes from left to right behind a prompt of at least one token: masks "
            "in a prompt are written without it"
        )


def decode_lossless(
    model: Any,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    options: DecodingOptions,
    observer: Observer | None = None,
) -> Decoded:
    """Decode what the clean stream alone would write, several tokens a forward where drafts agree.

    Arguments are those of `decode_blocks`; `prompts` hold no masks. Greedily the tokens are those
    of autoregressive decoding; at a temperature they are drawn from its distribution.
    """
    canvas, rows = open_rows(prompts, lengths, options, observer)
    kind, behind_cache = prompts.device.type, stands_behind_cache(model.config)
    policy = DraftPolicy(
        f"gated {kind}" if getattr(model, "is_gated", False) else kind,
        max(len(rows), 1),
        int(not options.token_shift),
        most=(options.block_size or 1) - 1,
        branched=behind_cache,
    )
    choice = Choice(options, len(rows), prompts.device, model.config.vocab_size)
    reader: Any = (CacheTreeReader if behind_cache else _Reader)(model, canvas)
    return write_verified(canvas, rows, reader, policy, choice, NoDrafter())


def _show(canvas: Canvas, rows: list[_Row]) -> None:
    """Show what is written, and what is drafted behind it."""
    if canvas.observer is not None:
        canvas.drafts = tuple(
            (row.number, row.clean + 1 + place, among[0])
            for row in rows
            for place, among in enumerate(row.candidates[: row.left])
        )
    canvas.show()


class NoDrafter:
    """Drafts nothing: the verifier's own forwards do."""

    shows = False

    def draft(self, rows: list[_Row], policy: Any, choice: Choice) -> None:
        """Leave rows their candidates."""

    def select(self, rows: list[_Row], kept: list[int]) -> None:
        """Keep nothing of any row."""


def open_rows(
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    options: DecodingOptions,
    observer: Observer | None,
) -> tuple[Canvas, list[_Row]]:
    """Return the text of a decoding from left to right, and its rows behind their prompts."""
    new = options.max_new_tokens
    canvas = Canvas(prompts, lengths, options, limits=lengths + new, observer=observer)
    told = torch.stack([lengths, prompts.gather(1, lengths[:, None] - 1).squeeze(-1)]).tolist()
    return canvas, [
        _Row(n, length - 1, last, new) for n, (length, last) in enumerate(zip(*told, strict=True))
    ]


def write_verified(
    canvas: Canvas,
    rows: list[_Row],
    reader: Any,
    policy: Any,
    choice: Choice,
    drafter: Any,
) -> Decoded:
    """Write what the verifier says, forward by forward, as far as drafts agree with it.

    Args:
        canvas: The text.
        rows: Its rows.
        reader: Runs the verifier over a tree of every row.
        policy: Which tree.
        choice: Which token a distribution writes.
        drafter: Drafts before each of its forwards: `NoDrafter`, or another model's.
    """
    options, device = canvas.options, canvas.tokens.device
    near_at: list[tuple[int, int]] = []  # row, column of what is close
    if rows:
        reader.read_prompt(rows)
    canvas.show()
    while rows:
        drafter.draft(rows, policy, choice)
        if canvas.observer is not None and drafter.shows:
            _show(canvas, rows)
        drafted = max(len(row.candidates) for row in rows)
        tree = policy.choose(drafted, max(row.left for row in rows))
        tokens = sent([row.nodes(tree) for row in rows], device)
        verdict, behind = reader.read(rows, tree, tokens)
        if options.rules.is_set:
            verdict = _follow_rules(verdict, tokens, rows, tree, canvas)
        said, near, candidates, sure = _judge(verdict, behind, rows, tree, choice)
        paths, wrote = zip(
            *(row.accept(tree, own, policy) for row, own in zip(rows, said, strict=True)),
            strict=True,
        )
        places = []  # row, column, token of what is written
        for line, (row, path, written) in enumerate(zip(rows, paths, wrote, strict=True)):
            ended = [n for n, token in enumerate(written) if token in options.eos_token_ids]
            written = written[: min(row.left, ended[0] + 1 if ended else row.left)]
            first = row.clean + 1
            places += [(row.number, first + n, token) for n, token in enumerate(written)]
            short = enumerate(path[: len(written)])
            near_at += [(row.number, first + n) for n, node in short if near[line][node]]
            row.left = 0 if ended and ended[0] < len(written) else row.left - len(written)
            row.last = written[-1]
            has_group = path[-1] < tree.groups
            row.candidates = candidates[line][path[-1]] if has_group else []
            row.sure = sure[line][path[-1]] if has_group else []
            choice.forget(row.number, first + len(written))
        reader.keep(rows, list(paths))
        policy.drafted(tree, len(places) / len(rows))
        number, column, token = sent(places, device).unbind(1)
        canvas.tokens[number, column] = token
        canvas.masked[number, column] = False
        canvas.order[number, column] = canvas.forwards
        _show(canvas, rows)
        if options.stops.is_set:
            for row in rows:
                row.left = 0 if canvas.is_stopped(row.number) else row.left
        kept = [line for line, row in enumerate(rows) if row.left]
        if len(kept) < len(rows):
            rows = [rows[line] for line in kept]
            canvas.rows = canvas.rows[sent(kept, device)]
            for reading in (reader, drafter) if rows else ():
                reading.select(rows, kept)
    ends = canvas.stops.tolist()
    close = sum(column < ends[row] for row, column in near_at)
    return replace(canvas.result(), close=close)


def _follow_rules(
    verdict: torch.Tensor, tokens: torch.Tensor, rows: list[_Row], tree: Tree, canvas: Canvas
) -> torch.Tensor:
    """Have the verifier go by the rules: each node with the text that it would stand behind.

    Args:
        verdict: Logits of the nodes, shape (rows, nodes, vocab).
        tokens: The nodes, shape (rows, nodes); the first is the last known token.
        rows: The rows.
        tree: The forward's tree.
        canvas: Their texts.

    Returns:
        Logits of the same shape and type.
    """
    texts, places = [], []
    lengths = canvas.lengths.tolist()
    for line, row in enumerate(rows):
        known = canvas.tokens[row.number, : row.clean]
        ways: list[list[int]] = []  # the nodes that lead to each, itself included
        for node, (parent, depth, _) in enumerate(tree.nodes):
            ways.append([*ways[parent], node] if node else [0])
            texts.append((row.number, torch.cat([known, tokens[line, ways[node]]]), 1))
            places.append(row.clean + depth + 1 - lengths[row.number])
    options = canvas.options
    ruled = shape_logits(
        verdict.float().flatten(0, 1),
        texts,
        sent(places, verdict.device),
        options.rules,
        eos=options.eos_token_ids,
        new=options.max_new_tokens,
    )
    return ruled.view(verdict.shape).to(verdict.dtype)


def _judge(
    verdict: torch.Tensor, behind: torch.Tensor, rows: list[_Row], tree: Tree, choice: Choice
) -> tuple[list[list[int]], list[list[bool]], list[list[list[list[int]]]], list[list[list[bool]]]]:
    """What the verifier writes behind each node, and what is drafted behind that.

    Args:
        verdict: Logits of the nodes, shape (rows, nodes, vocab).
        behind: Of the drafted positions, shape (rows, groups, drafted, vocab).
        rows: The rows.
        tree: The forward's tree.
        choice: Which token a distribution writes.

    Returns:
        Of each row and node the token, and whether another is as likely but for rounding; of each
        row and group the candidates of each position, and whether the likeliest is sure.
    """
    steps = range(behind.shape[2]) if tree.groups else ()
    nodes = [(r.number, r.clean + depth + 1) for r in rows for _, depth, _ in tree.nodes]
    drafts = [
        (r.number, r.clean + depth + 2 + step)
        for r in rows
        for _, depth, _ in tree.nodes[: tree.groups]
        for step in steps
    ]
    said = choice.scores(verdict.flatten(0, 1), nodes).argmax(-1)  # (rows * nodes,)
    two = verdict.float().topk(2, -1).values  # (rows, nodes, 2)
    near = two[..., 0] - two[..., 1] < _CLOSE * torch.finfo(verdict.dtype).eps * two[..., 0].abs()
    found = [said.view(near.shape), near.long()]
    if drafts:
        ranked = choice.scores(behind.flatten(0, 2), drafts).topk(MOST_RANK, -1).indices
        # By its share of the model's own distribution, (rows, groups, drafted); nothing is denoised
        # further behind drafts that are verified.
        sure = torch.zeros_like(behind[..., 0], dtype=torch.long)
        if not tree.depth:
            sure = (behind.amax(-1) - behind.logsumexp(-1) >= log(SURE)).long()
        found += [sure.view(len(rows), -1), ranked.view(len(rows), -1)]
    # Once to the host, (rows, nodes + nodes + groups * drafted * (1 + ranks)).
    told = torch.cat(found, 1).tolist()
    count = near.shape[1]
    shape = (len(rows), tree.groups, len(steps))
    own, apart = [row[:count] for row in told], 2 * count + tree.groups * len(steps)
    near_by = [[bool(one) for one in row[count : 2 * count]] for row in told]
    if not drafts:
        return own, near_by, [[] for _ in rows], [[] for _ in rows]
    sures = torch.tensor([row[2 * count : apart] for row in told]).bool()
    candidates = torch.tensor([row[apart:] for row in told])
    return own, near_by, candidates.view(*shape, -1).tolist(), sures.view(shape).tolist()
