// Functions that are compiled for several x86 instruction sets, and chosen when the module is loaded.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define SJD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define SJD_HAS_CLONES 1
#else
#define SJD_CLONES
#endif
