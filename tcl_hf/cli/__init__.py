"""The command `tcl-hf`: its subcommands, and the frame that they share."""
