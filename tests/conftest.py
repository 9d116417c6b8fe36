import os
import signal

import torch
from hypothesis import settings

# Who starts the tests in the background of a shell without job control ignores SIGINT and SIGQUIT for all of its
# children, and the tests that send them would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# Triton reads this when it is first imported, and transformers imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shared machine stalls now and then; that is no finding about the code.
settings.register_profile("spectrumkv", deadline=None)
settings.load_profile("spectrumkv")
