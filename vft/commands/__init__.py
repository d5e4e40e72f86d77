"""The commands of ``vft``, one a file.

Each has HELP (its line in ``vft --help``), add_arguments(parser), and run(args), which returns an exit code or None for
0. What a command computes with is imported in run, so that help and wrong arguments need no torch.
"""
