"""The programs that lowbit is measured against, each in an environment of its own.

A peer is a folder of programs or a virtual environment under `.venv-peers/` (`make bench-peers`), a model in the peer's
own form, and a few lines that say how it is started and where its tokens per second are read. Everything that is the
same for all of them lies here once:

    tasks.py     what is measured: decode, prefill, several sequences, start, memory
    runners.py   how a peer is asked: a process for each measurement (llama.cpp), or a worker that stays (Python peers)
    workers/     the programs that run inside the peers' environments; they need nothing but the peer
    entries.py   the peers and ours: file, flags to try, bits, megabytes read per token
    rounds.py    A B A B: interleaved rounds, the machine's limits and its load beside each, results kept row by row
    report.py    the table of the goals, and what lies behind it
    prepare.py   makes the environments and the models
"""
