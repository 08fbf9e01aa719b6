"""`python -m fd_scale` and `torchrun -m fd_scale`."""

from fd_scale.cli import main

if __name__ == "__main__":
    main()
