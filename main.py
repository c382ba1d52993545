"""Entry of TorchSpec: ``python main.py --help`` lists the commands."""

from torchspec.cli import main

if __name__ == "__main__":
    main()
