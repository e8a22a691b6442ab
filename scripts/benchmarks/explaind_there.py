"""ExPLAIND's side of `beside_explaind.py`: the same training with its wrappers, then its prediction. A minute.

Runs in an environment of its own, which has ExPLAIND and not this package, and is started by the other script:

    PYTHON scripts/benchmarks/explaind_there.py PROBLEM ANSWER
"""

import contextlib
import io
import sys
import time
from pathlib import Path

import torch
from explaind.data_paths import DataPath
from explaind.epk_model import ExactPathKernelModel
from explaind.model_paths import ModelPath
from explaind.modulo_model.data import ClassificationDataset
from explaind.modulo_model.loss import RegularizedCrossEntropyLoss
from explaind.modulo_model.model import SingleLayerTransformerClassifier
from explaind.optimizer_paths import AdamWOptimizerPath
from torch.utils.data import DataLoader


def resident(which):
    """A line of the process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(which))


def size(checkpoints):
    """MiB of the tensors in nested lists and dicts."""
    if isinstance(checkpoints, torch.Tensor):
        return checkpoints.nbytes / 2**20
    parts = checkpoints.values() if isinstance(checkpoints, dict) else checkpoints
    return sum(size(p) for p in parts if isinstance(p, (dict, list, torch.Tensor)))


def wrapped(problem):
    """Its model, optimizer, loss and data, as its training script makes them."""
    net = SingleLayerTransformerClassifier(
        problem["n_tokens"], d_model=problem["d_model"], nhead=4, dim_mlp=problem["d_mlp"], dropout=0.0
    )
    net.load_state_dict(
        problem["parameters"], strict=False
    )  # it has position embeddings that it does not use
    model = ModelPath(net, device="cpu", output_dim=problem["n_tokens"])
    optimizer = AdamWOptimizerPath(model, device="cpu", checkpoints=[], **problem["adamw"])
    targets = problem["targets"].tolist()
    loader = DataLoader(
        ClassificationDataset(problem["tokens"].tolist(), targets), batch_sampler=problem["order"].tolist()
    )
    return model, optimizer, RegularizedCrossEntropyLoss(alpha=0.0, device="cpu"), DataPath(loader)


def train(model, optimizer, loss, data):
    """The steps, each logged as its README says."""
    for batch in data.dataloader:
        tokens, targets = data.get_batch(batch)
        optimizer.zero_grad()
        loss(model.forward(tokens), targets).backward()
        optimizer.step()
        model.log_checkpoint()
        optimizer.log_checkpoint()


def explained(problem):
    """Weights and predictions, seconds and MiB."""
    before = resident("VmRSS")
    model, optimizer, loss, data = wrapped(problem)
    begin = time.process_time()
    train(model, optimizer, loss, data)
    trained = time.process_time()
    path = ExactPathKernelModel(
        model=model,
        optimizer=optimizer,
        loss_fn=loss,
        data_path=data,
        device="cpu",
        keep_param_wise_kernel=True,
        param_wise_kernel_keep_out_dims=True,
        **problem["integral"],
    )
    heldout, answers = problem["heldout"]
    predicted, initial, kernel, _, _ = path.predict(heldout, y_test=answers, keep_kernel_matrices=True)
    end = time.process_time()
    with torch.no_grad():
        final = model.forward(heldout, step=len(model.checkpoints) - 1)  # `predict` left it between two steps
    rows = torch.arange(len(heldout))
    by_example = {name: k[rows, 0, answers].detach() for name, k in kernel.items()}  # [heldout, example]
    return {
        "weights": {n: p.detach().clone() for n, p in model.model.named_parameters()},
        "initial": initial.detach(),
        "final": final,
        "predicted": predicted.detach(),
        "by_example": by_example,
        "seconds": {"training": trained - begin, "prediction": end - trained},
        "history": size(model.checkpoints) + size(optimizer.checkpoints) + size(data.checkpoints),
        "peak": resident("VmHWM") - before,
    }


def main(problem, answer):
    """Answer the problem in a file with another file."""
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        asked = torch.load(problem)
        few = {k: asked[k][:2] for k in ("tokens", "targets")} | {"order": torch.tensor([[0, 1]])}
        explained(
            {**asked, **few, "heldout": tuple(t[:1] for t in asked["heldout"])}
        )  # the code itself is loaded
        found = explained(asked)
    torch.save(found, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
