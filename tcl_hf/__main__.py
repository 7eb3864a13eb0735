"""`python -m tcl_hf` is the command `tcl-hf`, and `accelerate launch -m tcl_hf` starts it in several processes."""

from tcl_hf_command import main

if __name__ == "__main__":
    main()
