"""`python -m livt_scale` is `livt`: for torchrun and srun, which start modules."""

from livt_scale.cli.main import main

if __name__ == "__main__":
    main()
