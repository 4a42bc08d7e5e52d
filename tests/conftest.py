"""What every test shares: one torch thread, since tiny models spend more time handing work over than doing it."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
