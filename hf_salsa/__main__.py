"""`python -m hf_salsa SCRIPT.py ARGS...`: see `hf_salsa.launcher`."""

from .launcher import main

if __name__ == "__main__":
    main()
