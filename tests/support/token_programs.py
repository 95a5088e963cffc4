"""Random models whose token order is known: a judge of token layouts that shares no code with them.

A program is a list of steps (`token_steps`): a stem, reorderings, special tokens, convolutions,
attention sites. At each site the claim of the backend (`2 + 4x6x8 + 3`) is judged by the identities
(`token_identities`) of the rows of queries, keys and values. Then the compiled model's output is
compared with an eager run in which each rewritten site is a float64 brute force over a mask made of
the known cells.

    PYTHONPATH=tests python tests/support/token_programs.py --samples 20000 --seed 0 --wild
"""

from __future__ import annotations

import argparse
import logging
import operator
import random
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from token_identities import (
    Claim,
    Identities,
    Maker,
    NotApplicable,
    Segment,
    Site,
    Sizes,
    Truth,
    Values,
)
from token_steps import STEMS, STEPS, Kind, image_conv
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

import gna_compile  # noqa: F401  (before the backend's name is looked up)
from gna_compile.report.collect import collecting

TOLERANCE = 2e-3


OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "mul": operator.mul,
    "sub": operator.sub,
    "div": operator.truediv,
    "matmul": operator.matmul,
    "neg": operator.neg,
    "remainder": operator.mod,
}
OPERATORS |= {f"__{name}__": function for name, function in OPERATORS.items()}
OPERATORS |= {"__mod__": operator.mod, "__getitem__": operator.getitem}
OPERATORS |= {"__setitem__": operator.setitem, "__truediv__": operator.truediv}
REFLECTED = {"__radd__": operator.add, "__rmul__": operator.mul, "__rsub__": operator.sub}


class Recorder(TorchFunctionMode):
    """Writes down the graph that Dynamo would hand to a backend, ten times as fast, sizes fixed."""

    def __init__(self, model: Values, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.fakes = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.nodes: dict[int, fx.Node] = {}
        self.kept: list[Any] = []
        self.memory: dict[tuple[int, torch.dtype], Tensor] = {}
        self.inputs: list[Tensor] = []
        self.stack = {"L__self__": ("L['self']", Values)}
        positional, named = model.arguments(inputs)
        tensors: dict[str, Tensor] = {}
        tensors |= {f"L_self_{name}_": part for name, part in model.named_parameters()}
        tensors |= {f"L_self_{name}_": part for name, part in model.named_buffers()}
        tensors |= {f"L_inputs_{index}_": part for index, part in enumerate(positional)}
        tensors |= {f"L_{name}_": part for name, part in named.items()}
        for name, tensor in tensors.items():
            node = self.graph.placeholder(name.replace(".", "_"))
            if name.startswith("L_self_"):  # as Dynamo notes where an input comes from
                node._dynamo_source = SimpleNamespace(name=f"L['self'].{name[7:-1]}")
            self.bind(node, tensor)
            self.inputs.append(tensor)

    def bind(self, node: fx.Node, value: Any) -> None:
        self.kept.append(value)
        self.nodes[id(value)] = node
        node.meta["example_value"] = self.fake(value)

    def fake(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            # Tensors that share memory do so as fakes.
            storage = value.untyped_storage()
            key = storage.data_ptr(), value.dtype
            if key not in self.memory:
                length = storage.nbytes() // value.element_size()
                self.memory[key] = torch.empty(length, dtype=value.dtype, device="meta")
            strided = (value.shape, value.stride(), value.storage_offset())
            return FakeTensor(self.fakes, self.memory[key].as_strided(*strided), value.device)
        return type(value)(map(self.fake, value)) if type(value) in (tuple, list) else value

    def node_of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.nodes[id(value)]
        if isinstance(value, (tuple, list)):
            return (list if isinstance(value, list) else tuple)(map(self.node_of, value))
        return value

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            if not isinstance(out, Tensor):
                return out
            func, args = getattr, (args[0], func.__self__.__name__)
        elif isinstance(out, (int, bool, float, torch.Size, torch.dtype)):
            return out
        nodes = self.node_of(args)
        named = {key: self.node_of(value) for key, value in kwargs.items()}
        if func is getattr(torch.Tensor, name, None):
            if name in REFLECTED:
                node = self.graph.call_function(REFLECTED[name], nodes[::-1])
            elif name in OPERATORS:
                node = self.graph.call_function(OPERATORS[name], nodes, named)
            else:
                node = self.graph.call_method(name, nodes, named)
        else:
            node = self.graph.call_function(func, nodes, named)
        node.meta["nn_module_stack"] = dict(self.stack)
        if isinstance(out, Tensor):
            if id(out) in self.nodes:
                # In place: as in Dynamo's graphs, what comes later still refers to the first node.
                node.meta["example_value"] = self.nodes[id(out)].meta["example_value"]
            else:
                self.bind(node, out)
        elif isinstance(out, (tuple, list)):
            node.meta["example_value"] = tuple(map(self.fake, out))
            self.kept.append(out)
            for index, element in enumerate(out):
                part = self.graph.call_function(operator.getitem, (node, index))
                part.meta["nn_module_stack"] = dict(self.stack)
                self.bind(part, element)
        return out


def compiled_directly(model: Values, inputs: Sequence[Tensor], options: dict[str, Any]) -> Tensor:
    """The model's output behind the backend, on a graph that `Recorder` wrote."""
    recorder = Recorder(model, inputs)
    positional, named = model.arguments(inputs)

    def around(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = f"L__self___sites_{index}"
        recorder.stack[key] = (f"L['self'].sites[{index}]", Site)  # type: ignore[assignment]
        out: Tensor = model.sites[index].forward(q, k, v)
        del recorder.stack[key]
        return out

    model.reference = around
    with recorder:
        out = model.forward(*positional, **named)
    model.reference = None
    recorder.graph.output((recorder.nodes[id(out)],))
    gm = fx.GraphModule({}, recorder.graph)
    backend = torch._dynamo.backends.registry.lookup_backend("gna")
    with tracing(TracingContext(recorder.fakes)):
        run = backend(gm, recorder.inputs, options=options)  # type: ignore[call-arg]
    return run(*recorder.inputs)[0]


@dataclass(frozen=True)
class Spec:
    """All that a program is made of; steps that do not apply are left out.

    Attributes:
        steps: name and seed, the stem first.
    """

    seed: int
    wild: bool
    dynamic: bool
    sizes: Sizes
    stride: int
    steps: tuple[tuple[str, int], ...]
    by_dynamo: bool

    @classmethod
    def draw(cls, seed: int, wild: bool) -> Spec:
        rng = random.Random(f"{seed}{wild}")
        dynamic = rng.random() < 0.03
        even = dynamic or rng.random() < 0.6
        sizes = Sizes(
            b=2 if dynamic else rng.choice([1, 1, 2]),
            t=rng.choice([2, 3, 4] if dynamic else [1, 2, 2, 3]),
            h=rng.choice([4, 6] if even else [2, 3, 4, 5]),
            w=rng.choice([4, 6, 8] if even else [3, 4, 5, 7]),
            text=rng.choice([3, 5]),
        )
        stems = list(STEMS.items())
        kinds = list(STEPS.items())

        def pick(options: list[tuple[str, Kind]]) -> tuple[str, int]:
            weights = [kind.wild if wild else kind.tame for _, kind in options]
            return rng.choices(options, weights)[0][0], rng.getrandbits(32)

        steps = [
            pick(stems),
            *(pick(kinds) for _ in range(rng.randint(2, 4) if dynamic else rng.randint(3, 9))),
        ]
        steps.append(("self_attention", rng.getrandbits(32)))
        by_dynamo = dynamic or rng.random() < 0.03
        return cls(seed, wild, dynamic, sizes, rng.choice([1, 1, 2]), tuple(steps), by_dynamo)

    def build(self) -> Maker:
        m = Maker(self.sizes, self.dynamic, self.wild, torch.Generator())
        for name, seed in self.steps:
            m.rng = random.Random(seed)
            m.generator.manual_seed(seed)
            kind = STEMS.get(name) or STEPS[name]
            saved = replace(m)
            counts = [len(part) for part in (m.inputs, m.spellings, m.site_names, m.site_open)]
            m.names.append(name)
            try:
                m.steps.append(kind.make(m))
            except NotApplicable:
                m.names.pop()
                for attribute in ("form", "t", "h", "w", "pre", "post", "is_open"):
                    setattr(m, attribute, getattr(saved, attribute))
                parts = (m.inputs, m.spellings, m.site_names, m.site_open)
                for part, count in zip(parts, counts, strict=True):
                    del part[count:]  # type: ignore[attr-defined]
                if name in STEMS:
                    m.steps.append(image_conv(m))
                    m.names.append("image_conv")
        return m

    def other_sizes(self) -> list[Sizes]:
        """Sizes to run a dynamic program at after its first ones."""
        s = self.sizes
        other = replace(s, h=s.w + 2, w=s.h, text=s.text + 2)
        return [other, replace(s, t=s.t + 2, h=s.h + 4)][: 1 + self.seed % 2]


@dataclass
class SiteResult:
    """What became of one site: wrong, rewritten, declined (though expected), open or dense."""

    outcome: str
    fault: str
    detail: str
    names: tuple[str, ...]


@dataclass
class Outcome:
    """All sites of a program, and whether its numbers are those of the known masks."""

    sites: list[SiteResult] = field(default_factory=list)
    numbers: str = ""

    @property
    def faults(self) -> list[str]:
        faults = [site.fault for site in self.sites if site.outcome == "wrong"]
        return faults or ([self.numbers] if self.numbers else [])


def policy(stride: int) -> dict[str, Any]:
    rule = {"window": "1/2", "stride": stride}
    return {"version": 1, "min_tokens": 1, "min_speedup": 0, "rules": [rule]}


def masked_attention(truth: Truth, claim: Claim) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    visible = torch.from_numpy(truth.visible(claim))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~visible.view(scores.shape), -torch.inf)
        return (scores.softmax(-1) @ v.double()).float()

    return attend


def run(spec: Spec) -> Outcome:
    """Builds, compiles and judges one program."""
    maker = spec.build()
    outcome = Outcome()
    options: dict[str, Any] = {"policy": policy(spec.stride), "inner": "eager"}
    by_dynamo = spec.dynamic or spec.by_dynamo
    if by_dynamo:
        torch._dynamo.reset()
    with torch.no_grad():
        truths = Identities(maker).run(spec.sizes)
        model = Values(maker).eval()
        compiled = torch.compile(
            model,
            backend="gna",
            dynamic=spec.dynamic or None,
            fullgraph=True,
            options=options,
        )
        decisions: list[dict[int, Any]] = []
        for sizes in [spec.sizes, *(spec.other_sizes() if spec.dynamic else [])]:
            generator = torch.Generator().manual_seed(spec.seed)
            inputs = [part.values(sizes, generator) for part in maker.inputs]
            positional, named = model.arguments(inputs)
            if sizes is not spec.sizes:
                try:
                    truths = Identities(maker).run(sizes)
                    model(*positional, **named)
                except (RuntimeError, NotApplicable):
                    continue
            with collecting() as records:
                if by_dynamo:
                    actual = compiled(*positional, **named)
                else:
                    actual = compiled_directly(model, inputs, options)
            for record in records:
                rows = {int(row.layer.rsplit(".", 1)[1]): row for row in record.rows}
                decisions.append(rows)
                judge(maker, truths, rows, spec, outcome)
            if outcome.faults:
                return outcome
            outcome.numbers = compare(model, inputs, actual, truths, decisions, spec)
            if outcome.numbers:
                outcome.numbers += "" if sizes is spec.sizes else ", at other sizes"
                return outcome
    return outcome


def judge(
    maker: Maker, truths: dict[int, Truth], rows: dict[int, Any], spec: Spec, outcome: Outcome
) -> None:
    for index, truth in truths.items():
        row = rows.get(index)
        expected = truth.expected
        names = maker.site_names[index]
        if row is None:
            outcome.sites.append(SiteResult("wrong", "no decision", "", names))
            continue
        if row.decision == "gna":
            claims = Claim.parse(row.layout, spec.stride)
            faults = [truth.fault(*claim.segments) for claim in claims]
            kind = "wrong" if all(faults) else "rewritten" if expected else "open"
            detail = f"claimed {row.layout}, expected {expected or 'dense'}"
            outcome.sites.append(SiteResult(kind, faults[0] if all(faults) else "", detail, names))
            if kind == "rewritten" and maker.site_open[index]:
                outcome.sites[-1].outcome = "open"
        elif expected and not maker.site_open[index]:
            assert "failed" not in row.detail, row.detail  # a crash that was caught
            detail = f"{row.reason}: {row.detail}"
            outcome.sites.append(SiteResult("declined", "", detail, names))
        else:
            outcome.sites.append(SiteResult("dense", "", f"{row.reason}", names))


def compare(
    model: Values,
    inputs: list[Tensor],
    actual: Tensor,
    truths: dict[int, Truth],
    decisions: list[dict[int, Any]],
    spec: Spec,
) -> str:
    """ "" if the output is that of the known masks, under the decisions of any graph so far."""
    errors = []
    for rows in reversed(decisions):
        attends = {}
        for index, row in rows.items():
            if row.decision != "gna" or index not in truths:
                continue
            layouts = _layouts_now(row, truths[index], spec.stride)
            if not layouts:
                break
            attends[index] = masked_attention(truths[index], layouts[0])
        else:

            def reference(
                index: int, q: Tensor, k: Tensor, v: Tensor, attends: Any = attends
            ) -> Tensor:
                if index in attends:
                    return attends[index](q, k, v)
                return model.sites[index](q, k, v)

            def disturbed(index: int, *operands: Tensor, attend: Any = reference) -> Tensor:
                out: Tensor = attend(index, *operands)
                return out * (1 + 1e-6 * torch.randn_like(out))

            positional, named = model.arguments(inputs)
            model.reference = reference
            expected = model(*positional, **named)
            scale = expected.abs().max().clamp(min=1)
            error = float((actual - expected).abs().max() / scale)
            if error >= TOLERANCE:
                # Scores of hundreds make a model that rounding alone throws off.
                model.reference = disturbed
                noise = float((model(*positional, **named) - expected).abs().max() / scale)
                error = 0.0 if error < 10 * noise else error
            model.reference = None
            if error < TOLERANCE:
                return ""
            errors.append(error)
    return "numbers" if errors else "a grid at sizes where there is none"


def _layouts_now(row: Any, truth: Truth, stride: int) -> list[Claim]:
    """The claim, or at other sizes the one layout that the tokens have."""
    claims = Claim.parse(row.layout, stride)
    right = [claim for claim in claims if not truth.fault(*claim.segments)]
    layout = truth.layout(only_usual=False) or truth.several_grids()
    if not right and layout:
        return [Claim(layout, stride)]
    if not right:
        # An order that may be taken or not, at other sizes.
        tokens = truth.q.shape[1]
        for height in range(2, tokens):
            grid = height, tokens // height
            if tokens % height == 0 and not truth.fault(grid):
                return [Claim((grid,), stride)]
        # One axis: as many global tokens as there are weak ones around the rest.
        for prefix in range(tokens):
            for suffix in range(tokens - prefix):
                segments: tuple[Segment, ...] = (prefix, (tokens - prefix - suffix,), suffix)
                if not truth.fault(*segments):
                    return [Claim(segments, stride)]
    return right


def shrink(spec: Spec, still: Callable[[Outcome], bool]) -> Spec:
    """Leaves out steps as long as `still` holds."""
    changed = True
    while changed:
        changed = False
        for index in range(len(spec.steps) - 1, 0, -1):
            steps = spec.steps[:index] + spec.steps[index + 1 :]
            smaller = replace(spec, steps=steps)
            try:
                if still(run(smaller)):
                    spec, changed = smaller, True
            except Exception:
                continue
    return spec


@dataclass
class Summary:
    """Counts over many programs."""

    samples: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[Spec, list[str]]] = field(default_factory=list)
    errors: list[tuple[Spec, str]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    declined: list[tuple[Spec, str]] = field(default_factory=list)
    by_step: defaultdict[str, list[int]] = field(
        default_factory=lambda: defaultdict(lambda: [0, 0])
    )

    def add(self, spec: Spec) -> None:
        self.samples += 1
        try:
            outcome = run(spec)
        except Exception as error:
            self.errors.append((spec, f"{type(error).__name__}: {str(error)[:300]}"))
            return
        if outcome.faults:
            self.wrong.append((spec, outcome.faults))
            self.faults.update(outcome.faults)
        for site in outcome.sites:
            self.outcomes[site.outcome] += 1
            if site.outcome in ("rewritten", "declined"):
                for name in set(site.names):
                    self.by_step[name][0] += 1
                    self.by_step[name][1] += site.outcome == "declined"
            if site.outcome == "declined":
                self.reasons[site.detail[:110]] += 1
                self.declined.append((spec, site.detail))

    @property
    def recall(self) -> float:
        rewritten, declined = self.outcomes["rewritten"], self.outcomes["declined"]
        return rewritten / max(rewritten + declined, 1)

    def __str__(self) -> str:
        families: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        for name, counts in self.by_step.items():
            family = families[name.split(" (")[0]]
            family[0] += counts[0]
            family[1] += counts[1]
        lines = [
            f"{self.samples} samples, {len(self.wrong)} wrong, {len(self.errors)} errors",
            f"sites: {dict(self.outcomes)}",
            f"recall {self.recall:.1%} of the sites with a known grid of two or three axes",
        ]
        lines += [f"  wrong {count:5d}  {fault}" for fault, count in self.faults.most_common()]
        lines += [f"  declined {count:5d}  {why}" for why, count in self.reasons.most_common(12)]
        often = [(name, n, d) for name, (n, d) in families.items() if d > 2]
        often.sort(key=lambda item: -item[2] / item[1])
        lines += [f"  declined {d:4d} of {n:4d} sites behind {name}" for name, n, d in often[:30]]
        return "\n".join(lines)

    def print_examples(self, wrong: int, declined: int) -> None:
        """Shrinks some of the wrong and of the declined samples, and prints them by kind."""
        for spec, message in self.errors[:5]:
            print(f"error, seed {spec.seed}: {message}")
        kinds: defaultdict[str, list[Spec]] = defaultdict(list)
        for spec, faults in self.wrong[:wrong]:
            small = shrink(spec, partial(_has_fault, faults[0]))
            kinds[f"{faults[0]}: {_outline(small)}"].append(small)
        for kind, specs in sorted(kinds.items(), key=lambda item: -len(item[1])):
            print(f"wrong {len(specs):4d}  {kind}")
            show(min(specs, key=lambda spec: len(spec.steps)))
        programs = Counter(
            _outline(shrink(spec, partial(_declines, why)))
            for spec, why in self.declined[:declined]
        )
        for program, count in programs.most_common():
            print(f"declined {count:4d}  {program}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--samples", type=int, default=0, help="0: until interrupted")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample")
    parser.add_argument("--wild", action="store_true", help="only what no real model would do")
    parser.add_argument("--tame", action="store_true", help="only what real models do")
    parser.add_argument("--shrink", type=int, default=20, help="how many wrong samples to shrink")
    parser.add_argument("--declined", type=int, default=0, help="how many declined ones to shrink")
    parser.add_argument("--one", action="store_true", help="run the sample of --seed and show it")
    options = parser.parse_args()
    quieten()
    kinds = [wild for wild in (False, True) if not (options.tame if wild else options.wild)]
    if options.one:
        for wild in kinds:
            show(Spec.draw(options.seed, wild))
        return
    summaries = {wild: Summary() for wild in kinds}
    began, count = time.perf_counter(), 0
    try:
        while not options.samples or count < options.samples:
            wild = kinds[count % len(kinds)]
            summaries[wild].add(Spec.draw(options.seed + count // len(kinds), wild))
            count += 1
            if count % 500 == 0:
                wrong = sum(len(summary.wrong) for summary in summaries.values())
                rate = count / (time.perf_counter() - began)
                print(f"{count} samples, {wrong} wrong, {rate:.1f}/s", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        pass
    print(f"{count / (time.perf_counter() - began):.1f} samples a second")
    for wild, summary in summaries.items():
        print(f"{'wild' if wild else 'tame'}: {summary}")
        summary.print_examples(options.shrink, options.declined)
    sys.exit(any(summary.wrong or summary.errors for summary in summaries.values()))


def _has_fault(fault: str, outcome: Outcome) -> bool:
    return fault in outcome.faults


def _declines(why: str, outcome: Outcome) -> bool:
    code = why.split(":")[0]
    return any(
        site.outcome == "declined" and site.detail.startswith(code) for site in outcome.sites
    )


def _outline(spec: Spec) -> str:
    return " | ".join(name.split(" ")[0] for name in spec.build().names)


def show(spec: Spec) -> None:
    """Prints a program and what became of its sites."""
    print(f"  seed {spec.seed}: {' | '.join(spec.build().names)}")
    print(f"  {spec.sizes}, {'dynamic' if spec.dynamic else 'static'}")
    outcome = run(spec)
    for site in outcome.sites:
        print(f"  {site.outcome} {site.fault} {site.detail}")
    if outcome.numbers:
        print(f"  {outcome.numbers}")


def quieten() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch._dynamo.config.recompile_limit = 10_000


if __name__ == "__main__":
    main()
