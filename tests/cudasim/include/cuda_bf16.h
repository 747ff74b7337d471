// For a kernel to include: cudasim.h has it all already.
#pragma once
