// Stands before CUDA's header of this name on the include path.
#pragma once
#include "cuda_emu.h"
