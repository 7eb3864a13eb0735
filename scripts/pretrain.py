"""Pre-train TCL: `accelerate launch scripts/pretrain.py [--recipe NAME] [--name value ...]`."""

from tcl_hf.cli.pretrain import main

if __name__ == "__main__":
    main()
