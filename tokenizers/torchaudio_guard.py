"""torchaudio, importable beside any build of torch.

The parts we use (MelSpectrogram, GriffinLim, Resample) are pure PyTorch, yet torchaudio's native extension fails to
load beside a torch built for another CUDA, or for none. Only then is the extension declared absent.
"""

import sys
import types

try:
    import torchaudio
except (OSError, ImportError):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        del sys.modules[name]
    absent = types.ModuleType("torchaudio._extension")
    absent._IS_TORCHAUDIO_EXT_AVAILABLE = False
    absent._IS_ALIGN_AVAILABLE = False
    absent.fail_if_no_align = lambda function: function
    absent._check_cuda_version = lambda: None
    sys.modules["torchaudio._extension"] = absent
    import torchaudio
import torchaudio.functional
import torchaudio.transforms

__all__ = ["torchaudio"]
