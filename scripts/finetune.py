"""Fine-tune TCL for a task: `accelerate launch scripts/finetune.py --recipe NAME [--name value ...]`."""

from tcl_hf.cli.finetune import main

if __name__ == "__main__":
    main()
