"""`python -m robustfpd`."""

from robustfpd.cli import main

if __name__ == "__main__":
    try:
        main()
    finally:
        # CPython remembers that a KeyboardInterrupt passed through source text under evaluation (libraries
        # evaluate some while they are imported) and, under `-m`, then dies by SIGINT instead of ending with
        # the exit code asked for, even if the interrupt was handled. Any later evaluation makes it forget.
        exec("")
