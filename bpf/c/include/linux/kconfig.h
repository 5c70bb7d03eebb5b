/* SPDX-License-Identifier: GPL-2.0-only */
/* bcc includes this before everything else. Nothing here describes a particular kernel: the programs touch
 * no kernel structure, so no kernel's headers are needed to compile them. */
#ifndef KND_LINUX_KCONFIG_H
#define KND_LINUX_KCONFIG_H

#define CONFIG_BPF_SYSCALL 1
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(6, 0, 0)

#endif
