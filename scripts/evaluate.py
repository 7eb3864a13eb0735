"""Evaluate TCL on a task: `accelerate launch scripts/evaluate.py --model FOLDER --task NAME --data SOURCE ...`."""

from tcl_hf.cli.evaluate import main

if __name__ == "__main__":
    main()
