/* SPDX-License-Identifier: GPL-2.0-only */
/* bcc's helper header asks for this file and needs nothing from it. */
