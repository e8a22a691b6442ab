"""The account of training beside ExPLAIND 0.1, on its own model and data. About five minutes on one core.

ExPLAIND's one-layer transformer learns addition modulo 113 for a few steps of AdamW. Both explain the very same
training: it is given the initial weights, the order of the data and the settings, and the weights after the last
step are compared. Asked of both: what wrote the log-probability of the right answer to held-out rows. Told for each
way of asking: how far the sum is from the change, CPU seconds a step, MiB at the peak, and the scores of single
training rows beside each other. Every way runs in a process of its own, one after the other.

ExPLAIND wants an environment of its own, which has torch, numpy and tqdm:

    python3.12 -m venv ../explaind && ../explaind/bin/pip install explaind==0.1.0
    .venv/bin/python scripts/benchmarks/beside_explaind.py --python ../explaind/bin/python --readme
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynamics as dy
from checkpoints import Checkpoint
from dynamics import sites, steps

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the scripts share
from scripts.shared import runs
from scripts.shared.into_readme import conclude, markdown, stamp

MODULUS, D_MODEL, N_HEADS, D_MLP = 113, 64, 4, 512
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 4.0}
"""ExPLAIND's model and optimizer, as its script trains them."""
ROWS, BATCH, STEPS, HELDOUT = 512, 64, 10, 2
"""Its script trains 4,000 rows at once for 4,000 steps, on a GPU. Batches are a part of the rows here: where they
are all of them in another order, ExPLAIND 0.1 adds scores up under other rows (`update_kernel_matrix`)."""
NODES = (1, 100)
"""Of ExPLAIND's integral, by the midpoint rule: as many gradients as our trapezoid's, and its scripts' choice."""
EVERY_OUTPUT = "trapezoid alone, every output"
"""Asks as much about outputs as ExPLAIND always answers; the others ask for the right one."""
BY_ROW = {"sources": lambda batch: batch[2].tolist()}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "trapezoid alone": {"max_nodes": 2},
    EVERY_OUTPUT: {"max_nodes": 2},
    "as it comes": {},
    "trapezoid alone, each row a source": {"max_nodes": 2, **BY_ROW},
    "tolerance 1e-4, each row a source": {"tolerance": 1e-4, **BY_ROW},
}
THERE = Path(__file__).with_name("explaind_there.py")

CAN_BE_ASKED = [
    [
        "sites",
        "any parts of parameters, heads and rows too",
        "tensors by row; single parameters over all rows",
    ],
    ["sources", "any label of rows, or single rows; old momentum, decay", "single rows; decay"],
    ["steps", "every step, or sums of several", "sums of so many steps"],
    ["measures", "any that can be differentiated", "every output for every held-out row, at once"],
    [
        "models, losses",
        "any `nn.Module`; a mean over rows",
        "one tensor in, one out; cross entropy; LLaMA by another class",
    ],
    ["optimizers", "any; by source AdamW, Adam, SGD; clipping, schedules", "AdamW, SGD"],
    ["resume", "from any checkpoint, with its optimizer", "the first step, wrapped before training"],
    ["accuracy", "to a tolerance, step by step", "a number of nodes for all steps"],
    [
        "kept of the history",
        "nothing; replayed from a checkpoint",
        "all weights, moments and batches, in memory",
    ],
    ["counterfactuals", "`patch_window` and others, beside it", "none"],
]


class Adder(nn.Module):
    """What ExPLAIND's one-layer model computes: heads without separate queries, keys and values, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        n_tokens, d_head = MODULUS + 2, D_MODEL // N_HEADS
        self.embed = nn.Embedding(n_tokens, D_MODEL)
        self.reads = nn.ModuleList(nn.Linear(D_MODEL, d_head, bias=False) for _ in range(N_HEADS))
        self.writes = nn.ModuleList(nn.Linear(d_head, D_MODEL, bias=False) for _ in range(N_HEADS))
        self.up, self.down = nn.Linear(D_MODEL, D_MLP), nn.Linear(D_MLP, D_MODEL)
        self.unembed = nn.Linear(D_MODEL, n_tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[row, pos] -> log-probabilities after the last position, [row, token]."""
        x = self.embed(tokens) * D_MODEL**0.5
        heads = []
        for read, write in zip(self.reads, self.writes, strict=True):
            z = read(x)
            heads.append(write(F.scaled_dot_product_attention(z, z, z)))
        attended = torch.stack(heads).sum(0)
        x = attended + self.down(self.up(attended).relu()).relu()
        return self.unembed(x)[:, -1].log_softmax(-1)


def its_name(name: str) -> str:
    """What ExPLAIND calls a parameter of ours."""
    part, _, rest = name.partition(".")
    number, _, last = rest.partition(".")
    known = {"embed": "input_emb", "up": "linear1", "down": "linear2", "unembed": "decoder"}
    if part in known:
        return f"{known[part]}.{rest}"
    return f"head{int(number) + 1}_{'encoder' if part == 'reads' else 'decoder'}.{last}"


def right(model: Any, batch: Any) -> Tensor:
    """The log-probability of the right answer, [row]."""
    found: Tensor = model(batch[0]).gather(-1, batch[1][:, None]).squeeze(-1)
    return found


def loss(model: Any, batch: Any) -> Tensor:
    """As it is trained."""
    return -right(model, batch).mean()


def drawn(seed: int = 0) -> tuple[Adder, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """A model, training rows and their answers, the rows of each step, and held-out rows with their answers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Adder()
        pairs = torch.tensor([(b, a) for a in range(MODULUS) for b in range(a, MODULUS)])
        pairs = pairs[torch.randperm(len(pairs))[: ROWS + HELDOUT]]
        epochs = -(-STEPS * BATCH // ROWS)
        order = torch.cat([torch.randperm(ROWS) for _ in range(epochs)])[: STEPS * BATCH]
    plus, equals = torch.full((len(pairs),), MODULUS), torch.full((len(pairs),), MODULUS + 1)
    tokens = torch.stack([pairs[:, 0], plus, pairs[:, 1], equals], -1)
    targets = pairs.sum(-1) % MODULUS
    return model, tokens[:ROWS], targets[:ROWS], order.view(STEPS, BATCH), (tokens[ROWS:], targets[ROWS:])


def resident(which: str) -> float:
    """A line of the process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(which))


def here(way: str) -> dict[str, Any]:
    """The account of the training, asked in one way; its rows' scores are [held-out row, training row]."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    model, tokens, targets, order, heldout = drawn()
    recipe = dy.Recipe(model, loss, partial(torch.optim.AdamW, **ADAMW))
    batches = [(tokens[i], targets[i], i) for i in order]
    pairs = list(enumerate(heldout[1].tolist()))
    asked = [(i, k) for i in range(HELDOUT) for k in range(MODULUS + 2)] if way == EVERY_OUTPUT else pairs
    probes = {f"{i}, {k}": (heldout[0][i : i + 1], torch.tensor([k])) for i, k in asked}
    ask = partial(
        dy.attribute_training, recipe, None, sites=sites.parameters(model), measure=right, **WAYS[way]
    )
    first = dict(list(probes.items())[:2])
    ask([tuple(t[:2] for t in batches[0])], probes=first)  # the code itself is loaded
    before, begin = resident("VmRSS"), time.process_time()
    found = ask(batches, probes=probes, every=STEPS)
    seconds, peak = time.process_time() - begin, resident("VmHWM") - before
    start = Checkpoint.capture(model, recipe.build_optimizer(model.parameters()))
    last = steps.advance(recipe, start, STEPS, lambda step: batches[step])
    found = found.sel(example=[f"{i}, {k}" for i, k in pairs])
    written, value = found["attribution"].isel(step=-1), found["value"]
    by_row = np.zeros((HELDOUT, ROWS))
    if "source" in written.dims:
        for label in written["source"].values[:-2]:
            by_row[:, int(label)] = written.sel(source=label).sum("site")
    return {
        "sum": float(written.sum()) / HELDOUT,
        "change": float((value[-1] - value[0]).mean()),
        "weights": last.parameters,
        "by_row": by_row,
        "seconds": seconds,
        "peak": peak,
    }


def there(python: str, nodes: int) -> dict[str, Any]:
    """What ExPLAIND says of the same training, with a number of nodes in each step's integral."""
    model, tokens, targets, order, heldout = drawn()
    every = 1 if nodes == 1 else 1 / nodes
    problem = {
        "n_tokens": MODULUS + 2,
        "d_model": D_MODEL,
        "d_mlp": D_MLP,
        "parameters": {its_name(n): p.detach() for n, p in model.named_parameters()},
        "adamw": ADAMW,
        "tokens": tokens,
        "targets": targets,
        "order": order,
        "heldout": heldout,
        "integral": {"integral_eps": every, "early_integral_eps": None, "early_steps": 0},
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "problem.pt"), Path(folder, "answer.pt")
        torch.save(problem, asked)
        subprocess.run([python, str(THERE), str(asked), str(answer)], check=True)
        found = torch.load(answer)
    rows = torch.arange(HELDOUT)
    initial, final, predicted = (found[k][rows, heldout[1]].mean() for k in ("initial", "final", "predicted"))
    return {
        "sum": float(predicted - initial),
        "change": float(final - initial),
        "weights": {n: found["weights"][its_name(n)] for n, _ in model.named_parameters()},
        "by_row": torch.stack(list(found["by_example"].values())).sum(0).numpy() / BATCH,
        "seconds": sum(found["seconds"].values()),
        "peak": found["peak"],
        "history": found["history"],
    }


def bare() -> float:
    """CPU seconds of the training alone."""
    torch.set_num_threads(1)
    model, tokens, targets, order, _ = drawn()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    begin = time.process_time()
    for i in order:
        optimizer.zero_grad()
        loss(model, (tokens[i], targets[i])).backward()
        optimizer.step()
    return time.process_time() - begin


def in_its_own_process(function: Any, *arguments: Any) -> Any:
    """`function(*arguments)`, where nothing else has taken memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def row(name: str, found: Mapping[str, Any], loop: float) -> list[str]:
    """Cells of the table for one way of asking."""
    apart = 100 * abs(found["sum"] - found["change"]) / abs(found["change"])
    return [
        name,
        f"{found['sum']:.5f}",
        f"{apart:.3f} %",
        f"{found['seconds'] / STEPS:.3f}",
        f"{found['seconds'] / loop:.0f}",
        f"{found['peak']:.0f}",
        f"{found['history']:.1f}" if "history" in found else "0",
    ]


def agreement(ours: Mapping[str, Any], its: Mapping[str, Any]) -> str:
    """Sentences: how far the weights after the last step and the scores of training rows are apart."""
    apart = max(float((p - its["weights"][n]).abs().max()) for n, p in ours["weights"].items())
    scores = float(np.corrcoef(ours["by_row"].ravel(), its["by_row"].ravel())[0, 1])
    largest = float(np.abs(ours["by_row"] - its["by_row"]).max() / np.abs(its["by_row"]).max())
    same = "the same" if apart <= 1e-5 else "NOT the same"
    return (
        f"Weights after the last step are {same} (largest difference {apart:.1g}). Scores of single training rows: "
        f"correlation {scores:.5f}, largest difference {largest:.1g} of the largest score."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask both, and print the table."""
    parser = runs.parser(__doc__)
    parser.add_argument(
        "--python", help="the interpreter of an environment with ExPLAIND; without it ours alone"
    )
    given = parser.parse_args(arguments)
    loop = in_its_own_process(bare)
    ours = {way: in_its_own_process(here, way) for way in WAYS}
    its = {nodes: there(given.python, nodes) for nodes in NODES} if given.python else {}
    model = drawn()[0]
    size = sum(p.nbytes for p in model.parameters()) / 2**20
    rows = [row(f"account: {way}", found, loop) for way, found in ours.items()]
    rows += [row(f"ExPLAIND: {n} node{'s' * (n > 1)} a step", found, loop) for n, found in its.items()]
    lines = markdown(
        [
            f"change of {next(iter(ours.values()))['change']:.5f} nats",
            "sum",
            "apart",
            "CPU s a step",
            "bare loops",
            "peak, MiB",
            "history kept, MiB",
        ],
        rows,
    )
    if its:
        lines += ["", agreement(list(ours.values())[-1], list(its.values())[-1])]
    lines += [
        "",
        f"{STEPS} steps of {BATCH} of {ROWS} rows; mean log-probability of the right answer of {HELDOUT} held-out "
        f"rows. A model is {size:.2f} MiB, a bare loop {loop / STEPS:.4f} CPU s a step; one thread, each way in a "
        "process of its own, peaks above the loaded code, which a step of two rows loads. "
        f"ExPLAIND always answers for all {MODULUS + 2} outputs of each held-out row and for every "
        f"training row. {stamp(__file__)}",
        "",
        *markdown(["what can be asked", "account", "ExPLAIND 0.1"], CAN_BE_ASKED),
    ]
    conclude(given, "explaind", "\n".join(lines))


if __name__ == "__main__":
    main()
