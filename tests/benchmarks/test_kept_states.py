"""The benchmark of kept states counts the bytes of locked towers right."""

from helpers import small_patches
from kept_states import bytes_of

from tcl_hf import TCLForPreTraining


def test_locked_towers_take_memory_for_their_weights_only():
    """The weights by name, of a model without locks."""
    sizes = {name: p.numel() for name, p in TCLForPreTraining(small_patches()).named_parameters()}
    student = {name: size for name, size in sizes.items() if not name.startswith("teacher.")}
    towers = ("tcl.vision_model.", "tcl.text_model.embeddings.", "tcl.text_model.layers.0.", "tcl.text_model.layers.1.")
    trained = sum(size for name, size in student.items() if not name.startswith(towers))
    untaught = {"tcl.temperature", "itm_head.weight", "itm_head.bias"}  # they have no copy in the teacher
    taught = trained - sum(sizes[name] for name in untaught)
    found = bytes_of(small_patches(lock_vision=True, lock_text=True))
    assert found == {
        "weights": 4 * sum(student.values()),
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "teacher": 4 * taught,
    }
