"""Convert a checkpoint of the original code: `python scripts/convert_checkpoint.py SOURCE FOLDER`, and back."""

from tcl_hf.cli.convert import main

if __name__ == "__main__":
    main()
