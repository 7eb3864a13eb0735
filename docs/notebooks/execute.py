"""Run the notebooks of the documentation, and write what they print and draw into them: `python execute.py [FILE ...]`.

Each runs from the top, in an empty folder, on the CPU, with the interpreter that runs this. Its first code cell, which
installs the package, is left out. Progress and logs are not kept.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
INSTALL = "install"  # tag of the cell that installs the package
SECONDS = 240  # the longest that a notebook may take on an idle machine


def execute(path: Path, folder: Path, timeout: float | None = None) -> NotebookNode:
    """Run a notebook in a folder, and return it with its outputs.

    Args:
        timeout: seconds that a cell may take; None for any number.

    Raises:
        CellExecutionError: if a cell raises an error.
        CellTimeoutError: if a cell takes longer.
    """
    notebook = nbformat.read(path, as_version=4)
    cells = notebook.cells
    notebook.cells = [cell for cell in cells if INSTALL not in cell.metadata.get("tags", ())]
    # The kernel's own name may stand for another interpreter; this command is that of the caller.
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=timeout, startup_timeout=300, record_timing=False, resources=resources)
    client.create_kernel_manager()
    client.km.kernel_cmd = command
    with client.setup_kernel(env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}):
        for number, cell in enumerate(notebook.cells):
            client.execute_cell(cell, number)
    notebook.cells = cells
    for cell in cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _kept(cell.outputs)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def _kept(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs without progress and logs; what was printed in pieces becomes one output."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


if __name__ == "__main__":
    for file in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as empty:
            nbformat.write(execute(file, Path(empty)), file)
        print(f"{file.name} was run.")
