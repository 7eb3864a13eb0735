"""Share a model or a run on the Hub: `python scripts/push_to_hub.py FOLDER user/name`."""

from tcl_hf.cli.push import main

if __name__ == "__main__":
    main()
