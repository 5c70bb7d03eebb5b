/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KND_UAPI_LINUX_PKT_CLS_H
#define KND_UAPI_LINUX_PKT_CLS_H

/* "No opinion": the next program of the hook runs, and the packet goes on. Also TCX_NEXT. */
#define TC_ACT_UNSPEC (-1)
/* The packet is dropped. */
#define TC_ACT_SHOT 2

#endif
