"""Plan a pre-training run: `python scripts/plan.py [--recipe NAME] [--num_gpus 8] [--name value ...]`."""

from tcl_hf.cli.plan import main

if __name__ == "__main__":
    main()
