"""The base that all three stages stand on: scenes, maps, caches, scoring, evaluation. It knows no stage."""

import sys

if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
    from navsim_ext.runtime.early_help import answer

    answer(sys.orig_argv)
