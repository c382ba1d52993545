"""The commands beside training, one file each: a function of the same name, whose arguments are the command's options (the table is in ``cli.py``).

Heavy imports happen inside the functions, so that help is cheap.
"""
