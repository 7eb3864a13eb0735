"""`python -m tcl_hf` is the command `tcl-hf`, and `accelerate launch -m tcl_hf` starts it in several processes."""

from .cli.main import main

if __name__ == "__main__":
    main()
