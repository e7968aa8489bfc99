"""Every attack at its full count."""

from attacks import modules
from attacks.harness import main

if __name__ == "__main__":
    main(tuple(module.__name__.removeprefix("attacks.") for module in modules()))
