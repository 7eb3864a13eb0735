"""DINOv2 out of an ONNX file: the weights below a graph's head become a `Dinov2Model` of transformers.

`torch.onnx.export` keeps the name of a tensor that the graph reads as it is. It computes with constants in advance, and
the results lose their names: the weights of linear layers, which are transposed, and the positions, which are split
into those of the class token and of the patches. The nodes that read them show what they are.
"""

from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

POSITIONS = "embeddings.position_embeddings"
_RESHAPING = ("Cast", "Reshape", "Resize", "Transpose")  # what happens to the positions before they are joined


def read_dinov2(file: Path, config: Dinov2Config, part: str = "backbone") -> Dinov2Model:
    """Read a DINOv2 that is a part of the model in an ONNX file.

    Args:
        config: sizes of the DINOv2; without a mask token, which a graph for inference does not have.
        part: name of the module that is the DINOv2.

    Raises:
        ValueError: if the graph lacks a weight of such a model or has one more.
        ImportError: if onnx is missing.
    """
    weights = read_weights(file, part)
    model, report = Dinov2Model.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    wrong = sorted(report["missing_keys"] | report["unexpected_keys"])
    if wrong:
        raise ValueError(
            f"{file}: '{part}' is not a DINOv2 of these sizes, because the weights {', '.join(wrong[:3])} are missing "
            "or left over: name another part or other sizes."
        )
    return model


def read_weights(file: Path, part: str) -> dict[str, Tensor]:
    """Read the weights of a part of the model in an ONNX file, by the names that they had in PyTorch.

    Raises:
        ImportError: if onnx is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("ONNX files are read with the package 'onnx': pip install 'tcl_hf[demo]'.") from error
    graph = onnx.load(file).graph
    stored = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}

    def origin(name: str) -> str:
        while name in made_by and made_by[name].op_type in _RESHAPING:
            name = made_by[name].input[0]
        return name

    weights = {name: tensor for name, tensor in stored.items() if name.startswith(f"{part}.")}
    for node in graph.node:
        if node.op_type == "Add":
            # A linear layer is a product to which a named bias is added.
            for bias, product in permutations(node.input, 2):
                if bias in weights and product in made_by and made_by[product].op_type == "MatMul":
                    weight = made_by[product].input[1]
                    if weight in stored:
                        weights[f"{bias.removesuffix('bias')}weight"] = stored[weight].T.contiguous()
        elif node.op_type == "Concat" and all(origin(name) in stored for name in node.input):
            # Nothing else is joined of stored tensors alone: (1, 1, D) and (1, P, D) are the positions of all tokens.
            weights[f"{part}.{POSITIONS}"] = torch.cat([stored[origin(name)] for name in node.input], dim=1)
    return {name.removeprefix(f"{part}."): tensor for name, tensor in weights.items()}
