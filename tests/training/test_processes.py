"""Two real processes against one: the same losses, gradients and queues."""

import itertools
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import in_two_processes, small_patches, tiny_processor, tiny_records, training_batch
from torch import distributed

from tcl_hf import TCLForImageTextRetrieval, TCLForPreTraining
from tcl_hf.data.collators import TCLPreTrainingCollator
from tcl_hf.data.streams import StreamLoader
from tcl_hf.training.arguments import TCLTrainingArguments
from tcl_hf.training.guard import NonFiniteError, UpdateGuard
from tcl_hf.training.loop import TrainingRun

NUM_PAIRS = 6  # in both processes together
DRAWN = torch.tensor([3, 5, 1, 0, 2, 4])  # the negative of each pair, which most pairs have in the other process

CASES = [  # All objectives where negatives are gathered, else those whose keys are gathered anyway.
    (model_class, gather, ids, {})
    for model_class, ids in ((TCLForPreTraining, False), (TCLForImageTextRetrieval, True))
    for gather in (False, True)
]
CASES.append((TCLForPreTraining, True, False, {"lock_vision": True, "lock_text": 1}))


def run(accumulation: int) -> list[dict]:
    """The results of a process for its share of each case: losses, gradients and queues of two optimizer steps."""
    alone = not distributed.is_initialized()
    rank, world = (0, 1) if alone else (distributed.get_rank(), distributed.get_world_size())
    return [steps(*case, accumulation, rank, world) for case in CASES]


def run_and_save(rank: int, folder: Path, accumulation: int) -> None:
    distributed.init_process_group("gloo")
    assert distributed.get_world_size() == 2
    torch.save(run(accumulation), folder / f"rank-{rank}.pt")
    distributed.destroy_process_group()


def steps(model_class, gather: bool, with_ids: bool, locks: dict, accumulation: int, rank: int, world: int) -> dict:
    torch.manual_seed(0)
    weights = {} if gather else {"lmi_weight": 0.0, "itm_weight": 0.0}
    model = model_class(
        small_patches(gather_negatives=gather, mlm_weight=0.0, queue_size=10, **weights, **locks)
    ).train()
    trained = model
    if world > 1:
        trained = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    found: dict = {"losses": []}
    number = NUM_PAIRS // world
    for step in range(2):
        model.update_teacher()
        model.zero_grad()
        for part in range(accumulation):
            batch = training_batch(NUM_PAIRS, config=model.config, seed=10 * step + part)
            batch = {name: value for name, value in batch.items() if "mlm" not in name}
            if with_ids:
                batch["image_ids"] = torch.tensor([7, 8, 7, 9, 8, 5])
            mine = {name: value[rank * number : (rank + 1) * number] for name, value in batch.items()}
            if not gather:  # The collator pads to the longest text of its own batch.
                longest = int(mine["attention_mask"].sum(1).max())
                mine |= {name: mine[name][:, :longest] for name in ("input_ids", "attention_mask")}
            last = part == accumulation - 1
            with draws(model, gather, rank, number), synchronised(trained, last):
                output = trained(**mine, alpha=0.4)
                (output.loss / accumulation).backward()
            parts = (output.loss_cma, output.loss_imc, output.loss_lmi, output.loss_itm)
            found["losses"].append(torch.stack([part.detach() for part in parts if part is not None]))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
    found["gradients"] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found["queue"] = dict(model.queue.state_dict().items())
    return found


def synchronised(trained, last: bool):
    from contextlib import nullcontext

    return nullcontext() if last or not hasattr(trained, "no_sync") else trained.no_sync()


class draws:
    """Negatives as in `DRAWN`: of the whole batch where it is gathered, else within the batch of a process."""

    def __init__(self, model, gather: bool, rank: int, number: int):
        own = DRAWN[rank * number : (rank + 1) * number]
        self.index = (own - rank * number) % NUM_PAIRS if gather else (torch.arange(number) + 1) % number

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(
            "tcl_hf.models.modeling_tcl.sample_hard_negatives",
            lambda logits, excluded: (self.index, torch.ones(len(logits), dtype=torch.bool)),
        )

    def __exit__(self, *error):
        self.patch.undo()


@pytest.fixture(scope="module", params=[1, 2], ids=["one forward", "accumulated"])
def found(request, tmp_path_factory):
    """The results of both processes, and of one process alone."""
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(run_and_save, folder, request.param)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)], run(request.param)


@pytest.mark.parametrize(
    "case", range(len(CASES)), ids=[f"{c.__name__}-gather={g}{bool(locks) * '-locked'}" for c, g, _, locks in CASES]
)
def test_two_processes_equal_one(found, case):
    (first, second), alone = ([process[case] for process in found[0]], found[1][case])
    for one, other, whole in zip(first["losses"], second["losses"], alone["losses"], strict=True):
        assert len(whole) == (4 if CASES[case][1] else 2)
        torch.testing.assert_close((one + other) / 2, whole, rtol=0, atol=1e-5)
    for name, value in first["queue"].items():
        assert torch.equal(value, second["queue"][name]), name
        torch.testing.assert_close(value, alone["queue"][name], rtol=0, atol=1e-5)
    assert first["gradients"].keys() == alone["gradients"].keys()
    for name, gradient in first["gradients"].items():
        assert torch.equal(gradient, second["gradients"][name]), name
        torch.testing.assert_close(gradient, alone["gradients"][name], rtol=1e-4, atol=1e-5)


def take_steps_of_which_one_is_bad(rank: int, folder: Path) -> None:
    """Three optimizer steps of two forwards each; in the second step the first loss of rank 1 is not a number.

    The gradient stays finite, because a constant makes the loss NaN.
    """
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    model = torch.nn.parallel.DistributedDataParallel(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    guard, weights = UpdateGuard(torch.device("cpu")), []
    for step in range(3):
        for last in (False, True):
            with synchronised(model, last):
                loss = model(torch.full((1, 3), rank + 1.0)).sum()
                loss = loss + (float("nan") if (rank, step, last) == (1, 1, False) else 0)
                loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in layer.parameters()]) if last else None
            assert norm is None or norm.isfinite()
            guard.watch(optimizer, step, loss, norm)
        optimizer.step()
        optimizer.zero_grad()
        weights.append(layer.weight.detach().clone())
    try:
        guard.check(None)
        message = "nothing was found"
    except NonFiniteError as error:
        message = str(error)
    torch.save((weights, message), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_loss_that_is_not_finite_in_one_process_masks_the_update_of_all(tmp_path):
    in_two_processes(take_steps_of_which_one_is_bad, tmp_path)
    (first, message), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    assert message.startswith("Step 2:") and other.startswith("Step 2: the loss was nan")


def unequal_stream():
    """23 records in shards of 8, 8 and 7: each process reads one whole shard, and both share the third."""
    return Dataset.from_list(tiny_records(23)).to_iterable_dataset(num_shards=3)


def train_on_an_unequal_stream(rank: int, folder: Path) -> None:
    """Train for two epochs, and note the ids that each step sees."""
    torch.manual_seed(0)
    model, processor, seen = TCLForPreTraining(small_patches()), tiny_processor(), []
    model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["image_ids"].tolist()), with_kwargs=True)
    args = TCLTrainingArguments(
        str(folder / "run"), per_device_train_batch_size=3, dataloader_num_workers=0, max_steps=8, logging_steps=8
    )
    TrainingRun(
        model, unequal_stream(), TCLPreTrainingCollator(processor, with_image_ids=True), processor, args
    ).train()
    torch.save(seen, folder / f"{rank}.pt")


def test_training_uses_those_samples_of_an_unequal_stream_that_both_processes_have(tmp_path):
    in_two_processes(train_on_an_unequal_stream, tmp_path)
    trained = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    expected: list[list[list[int]]] = [[], []]
    lost = []
    for epoch in range(3):
        collator = TCLPreTrainingCollator(tiny_processor(), with_image_ids=True)
        own = []
        for rank in (0, 1):
            loader = StreamLoader(unequal_stream(), collator, 3, 0, rank=rank, world_size=2)
            loader.begin(epoch)
            own.append([batch["image_ids"].tolist() if batch else [] for batch in loader])
        everything = [number for batches in own for batch in batches for number in batch]
        assert len(everything) == len(set(everything)) == 23
        lost.append(23)
        for first, second in itertools.zip_longest(*own, fillvalue=[]):
            number = min(len(first), len(second))
            lost[-1] -= 2 * number
            if number:
                expected[0].append(first[:number])
                expected[1].append(second[:number])
    assert trained == [batches[:8] for batches in expected]
    assert min(lost) > 0  # because their number is odd
