"""The teacher moves by exactly the momentum; the queue is a ring of any size."""

import pytest
import torch
from torch import nn

from tcl_hf.models.losses import NO_IMAGE_ID
from tcl_hf.models.momentum import FeatureQueue, MomentumTeacher


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.temperature = nn.Parameter(torch.ones(()))


def test_teacher_starts_equal_and_frozen():
    student = Student()
    teacher = MomentumTeacher(encoder=student.encoder)
    assert torch.equal(teacher.encoder.weight, student.encoder.weight)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("momentum", [0.995, 0.5, 1.0, 0.0])
def test_teacher_moves_by_exactly_m_and_one_minus_m(momentum):
    student = Student()
    teacher = MomentumTeacher(encoder=student.encoder)
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    teacher.update(student, momentum)
    students = dict(student.named_parameters())
    for name, value in teacher.named_parameters():
        expected = momentum * before[name].double() + (1 - momentum) * students[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=2e-7)


def test_teacher_of_an_equal_student_does_not_drift():
    student = Student()
    teacher = MomentumTeacher(encoder=student.encoder)
    for _ in range(100):
        teacher.update(student, 0.995)
    assert torch.equal(teacher.encoder.weight, student.encoder.weight)


def test_teacher_is_updated_in_place():
    student = Student()
    teacher = MomentumTeacher(encoder=student.encoder)
    addresses = [parameter.data_ptr() for parameter in teacher.parameters()]
    teacher.update(student, 0.9)
    assert [parameter.data_ptr() for parameter in teacher.parameters()] == addresses


def test_queue_starts_as_unit_vectors_without_ids():
    queue = FeatureQueue(50, 8)
    for features in (queue.image, queue.text):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(50))
    assert not torch.equal(queue.image, queue.text)
    assert (queue.ids == NO_IMAGE_ID).all()
    assert queue.cursor.item() == 0


def pushed(queue: FeatureQueue, first: int, number: int) -> None:
    rows = torch.arange(first, first + number, dtype=torch.float32)[:, None].expand(-1, queue.image.shape[1])
    queue.push(rows, -rows, torch.arange(first, first + number))


@pytest.mark.parametrize("size", [1, 5, 7, 12])
@pytest.mark.parametrize("batches", [[3, 3, 3], [1] * 15, [5, 2, 9, 30, 4], [12, 1]])
def test_queue_overwrites_oldest_first_for_any_batch_size(size, batches):
    queue = FeatureQueue(size, 2)
    expected = [None] * size  # what a ring of Python objects holds
    cursor = first = 0
    for number in batches:
        pushed(queue, first, number)
        for value in range(first, first + number):
            expected[cursor] = value
            cursor = (cursor + 1) % size
        first += number
    assert queue.cursor.item() == cursor
    for row, value in enumerate(expected):
        if value is not None:
            assert queue.image[row].tolist() == [value] * 2
            assert queue.text[row].tolist() == [-value] * 2
            assert queue.ids[row].item() == value


def test_queue_of_size_zero_keeps_nothing():
    queue = FeatureQueue(0, 2)
    pushed(queue, 0, 3)
    assert queue.image.shape == (0, 2)


def test_push_without_ids_marks_the_rows_as_unknown():
    queue = FeatureQueue(4, 2)
    pushed(queue, 0, 4)
    queue.push(torch.ones(2, 2), torch.ones(2, 2))
    assert queue.ids.tolist() == [NO_IMAGE_ID, NO_IMAGE_ID, 2, 3]


def test_a_non_finite_row_does_not_enter_the_queue():
    queue = FeatureQueue(4, 2)
    pushed(queue, 0, 4)
    image = torch.tensor([[9.0, 9.0], [9.0, float("nan")]])
    queue.push(image, torch.ones(2, 2), torch.tensor([8, 9]))
    assert queue.image.isfinite().all()
    assert queue.ids.tolist() == [8, 1, 2, 3]
    assert queue.text[1].tolist() == [-1.0, -1.0]
    assert queue.cursor.item() == 2
