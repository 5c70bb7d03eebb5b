/* SPDX-License-Identifier: GPL-2.0-only */
/* Empty on purpose: bcc brings its own copy of the BPF interface, and a second one would redefine it. */
