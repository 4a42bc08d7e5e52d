"""`lowbit migrate script.py`: a script of the old systems, in lowbit's own names.

    rules.py     what each old name is here, and what becomes of its arguments: data, without libcst
    finding.py   finds the old names of a script, and decides which stay
    codemod.py   rewrites the others
    trees.py     the one file that imports libcst

What has no rule keeps its old name, is marked with a comment and listed; then `lowbit.compat.install()` stands at the top of the
script, so that it runs all the same, as it did under `python -m lowbit.compat`.
"""
