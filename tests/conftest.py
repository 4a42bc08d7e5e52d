"""What every test shares.

One torch thread, since tiny models spend more time handing work over than doing it. And an ear for Ctrl-C: a run started in the
background inherits a deaf one, which its child processes inherit in turn, and the tests of Ctrl-C would wait in vain.
"""

from __future__ import annotations

import signal

import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
