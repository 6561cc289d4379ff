"""`python -m robustfpd`."""

from robustfpd.cli import main

if __name__ == "__main__":
    try:
        main()
    finally:
        # After a KeyboardInterrupt in evaluated source text (some libraries evaluate source on import), CPython under
        # `-m` ends by SIGINT instead of the exit code, even if the interrupt was handled. Another evaluation resets it.
        exec("")
