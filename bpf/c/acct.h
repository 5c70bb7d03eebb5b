/* SPDX-License-Identifier: GPL-2.0-only */
/* What a packet is counted as, and where.
 *
 * Counted is what the wire carries, without preamble and checksum: the Ethernet header, a VLAN tag also when the
 * kernel keeps it beside the packet, of IPoIB its header of 4 bytes, and for a packet that stands for several
 * segments the headers that each of them will have. A packet that cannot be understood is counted as KIND_OTHER,
 * never left out. Not seen are the inner headers of tunnelled segments: the outer headers alone are repeated.
 *
 * KND_* come from the compiler's command line, out of bpf/layout.py and bpf/program.py. */
#ifndef KND_ACCT_H
#define KND_ACCT_H

#define INLINE static inline __attribute__((always_inline))
#define likely(x) __builtin_expect(!!(x), 1)
#define BIG_ENDIAN_16(x) ((u16)__builtin_bswap16(x))

enum direction { DIRECTION_EGRESS, DIRECTION_INGRESS };
enum kind { KIND_OTHER, KIND_IP, KIND_TCP, KIND_ROCE };

struct cell {
	u64 bytes;
	u64 packets;
};

/* One slot of map `acct`, per CPU. */
struct record {
	struct cell cells[KND_DIRECTIONS * KND_CLASSES * KND_KINDS];
};

/* The only entry of map `classes`. */
struct classes {
	u8 dscp[64];
	u8 pcp[8];
	u32 flags;
};

#define CLASSES_PCP_WINS 1 /* a tagged packet's class is its VLAN priority's, whatever its DSCP */

_Static_assert(sizeof(struct cell) == KND_CELL_BYTES, "struct cell differs from bpf/layout.py");
_Static_assert(sizeof(struct record) == KND_VALUE_BYTES, "struct record differs from bpf/layout.py");
_Static_assert(sizeof(struct classes) == KND_CLASSES_BYTES, "struct classes differs from bpf/layout.py");
_Static_assert(__builtin_offsetof(struct classes, pcp) == KND_DSCPS, "struct classes differs from bpf/layout.py");
_Static_assert(CLASSES_PCP_WINS == KND_PCP_WINS, "a flag differs from bpf/layout.py");
_Static_assert(KIND_ROCE == KND_KIND_ROCE && KIND_ROCE + 1 == KND_KINDS, "kinds differ from bpf/layout.py");
_Static_assert(KND_CLASSES == 8 && KND_KINDS == 4, "the masks in account() need these sizes");

#define ETHERNET_BYTES 14
#define IPOIB_PSEUDO_BYTES 20 /* the receiver's address, that the kernel puts before what it sends and receives */
#define IPOIB_BYTES 4
#define VLAN_BYTES 4
#define IPV4_BYTES 20
#define IPV6_BYTES 40
#define PORTS_BYTES 4
#define TAGS_MAX 2
#define EXTENSIONS_MAX 6
#define ROCE_PORT 4791

#define ETHERTYPE_IPV4 BIG_ENDIAN_16(0x0800)
#define ETHERTYPE_IPV6 BIG_ENDIAN_16(0x86dd)
#define ETHERTYPE_8021Q BIG_ENDIAN_16(0x8100)
#define ETHERTYPE_8021AD BIG_ENDIAN_16(0x88a8)

#define PROTO_HOPOPTS 0
#define PROTO_TCP 6
#define PROTO_UDP 17
#define PROTO_ROUTING 43
#define PROTO_FRAGMENT 44
#define PROTO_AH 51
#define PROTO_DSTOPTS 60
#define PROTO_SCTP 132
#define PROTO_MOBILITY 135
/* Not numbers of the wire: no IP header that makes sense, and one behind which nothing is known. */
#define PROTO_UNREADABLE 256
#define PROTO_OPAQUE 257

#define JUMBO_OPTION 0xc2

/* What dissect() found. at moves on from header to header and ends where the payload begins; network is where
 * the IP header of that version begins, 0 where there is none. */
struct frame {
	u32 at;
	u32 network;
	u32 version;
	u32 beside; /* bytes on the wire that skb->len lacks: the offloaded tag */
	u32 pseudo; /* bytes in skb->len that never reach the wire */
	u32 kind;
	u32 dscp;
	u32 pcp;
	u32 tagged;
};

/* The slot, with KND_IPOIB beside it. The compiler must not know the value, or it would fold it into addresses;
 * the loader patches it, and the verifier, which knows it then, drops what the other kind of device would need. */
INLINE u32 constant_of_this_copy(void)
{
	u32 constant = KND_SLOT_SENTINEL;

	asm volatile("" : "+r"(constant));
	return constant;
}

/* Copies a packet's bytes, a type at a time: from its linear part if they lie there, as they nearly always do,
 * else by the helper, which finds them anywhere. False past the packet's end. */
#define DEFINE_FETCH(name, type)                                                        \
	INLINE bool name(struct __sk_buff *skb, u32 at, type *to)                       \
	{                                                                               \
		u8 *p = (u8 *)(long)skb->data + at, *end = (u8 *)(long)skb->data_end;   \
                                                                                        \
		if (p + sizeof(type) <= end) {                                          \
			*to = *(type *)p;                                               \
			return true;                                                    \
		}                                                                       \
		return bpf_skb_load_bytes(skb, at, to, sizeof(type)) == 0;              \
	}

struct ipv4_start {
	u8 version_length, tos;
	u16 length;
	u16 id, fragment;
	u8 ttl, proto;
	u16 checksum;
} __attribute__((aligned(4)));

struct ipv6_start {
	u8 version_class, class_flow;
	u16 flow;
	u16 length;
	u8 next, hops;
} __attribute__((aligned(4)));

struct extension_start {
	u8 next, length;
	u16 rest;
} __attribute__((aligned(4)));

DEFINE_FETCH(fetch_u8, u8)
DEFINE_FETCH(fetch_u16, u16)
DEFINE_FETCH(fetch_ipv4, struct ipv4_start)
DEFINE_FETCH(fetch_ipv6, struct ipv6_start)

/* The value, but as one that the verifier does not know: else it would follow each combination of header
 * lengths to the end by itself, and loading would take many times as long. */
INLINE u32 unknown(const struct __sk_buff *skb, u32 value, u32 mask)
{
	u32 length = skb->len, same = length;

	asm volatile("" : "+r"(same));
	return (value + length - same) & mask;
}

/* An index that the verifier believes. Left to itself, the compiler drops a mask that it can prove needless, and
 * kernels before 6.2 forget what they knew of a number once it was kept on the stack. */
INLINE u32 bounded(u32 value, u32 mask)
{
	asm volatile("" : "+r"(value));
	return value & mask;
}

INLINE u32 link_layer(struct __sk_buff *skb, struct frame *f)
{
	u16 type, tag;
	u32 i;

	if (skb->vlan_present) {
		f->tagged = 1;
		f->pcp = skb->vlan_tci >> 13;
		f->beside = VLAN_BYTES;
	}
	if (!fetch_u16(skb, ETHERNET_BYTES - 2, &type))
		return 0;
	f->at = ETHERNET_BYTES;
	for (i = 0; i < TAGS_MAX && (type == ETHERTYPE_8021Q || type == ETHERTYPE_8021AD); i++) {
		if (!fetch_u16(skb, f->at, &tag) || !fetch_u16(skb, f->at + 2, &type))
			return 0;
		if (!f->tagged)
			f->pcp = (tag >> 5) & 7; /* the top bits of its first byte on the wire */
		f->tagged = 1;
		f->at += VLAN_BYTES;
	}
	return type;
}

/* Both ways alike: ipoib_hard_header() puts both headers before what is sent, and skb_add_pseudo_hdr() an empty
 * one before what came (drivers/infiniband/ulp/ipoib). There are no tags. */
INLINE u32 ipoib_layer(struct __sk_buff *skb, struct frame *f)
{
	u16 type;

	if (!fetch_u16(skb, IPOIB_PSEUDO_BYTES, &type))
		return 0;
	f->pseudo = IPOIB_PSEUDO_BYTES;
	f->at = IPOIB_PSEUDO_BYTES + IPOIB_BYTES;
	return type;
}

INLINE u32 ipv4(struct __sk_buff *skb, struct frame *f)
{
	struct ipv4_start ip;
	u32 bytes;

	if (!fetch_ipv4(skb, f->at, &ip) || skb->len < f->at + IPV4_BYTES)
		return PROTO_UNREADABLE;
	bytes = (ip.version_length & 15) * 4;
	if (ip.version_length >> 4 != 4 || bytes < IPV4_BYTES)
		return PROTO_UNREADABLE;
	f->dscp = ip.tos >> 2;
	f->network = f->at;
	f->version = 4;
	f->at += bytes;
	return ip.fragment & BIG_ENDIAN_16(0x1fff) ? PROTO_OPAQUE : ip.proto;
}

INLINE bool is_extension(u32 proto)
{
	return proto == PROTO_HOPOPTS || proto == PROTO_ROUTING || proto == PROTO_FRAGMENT || proto == PROTO_AH ||
	       proto == PROTO_DSTOPTS || proto == PROTO_MOBILITY;
}

INLINE u32 extensions(struct __sk_buff *skb, struct frame *f, u32 proto, bool jumbo)
{
	struct extension_start extension;
	u32 i;

	/* Left as a loop: unrolled, the program is twice as long and no faster. */
#pragma clang loop unroll(disable)
	for (i = 0; i < EXTENSIONS_MAX && is_extension(proto); i++) {
		u32 bytes;

		if (bpf_skb_load_bytes(skb, f->at, &extension, sizeof(extension)))
			return PROTO_OPAQUE;
		bytes = (extension.length + 1) * 8;
		if (proto == PROTO_AH)
			bytes = (extension.length + 2) * 4;
		else if (proto == PROTO_FRAGMENT)
			bytes = 8;
		f->at = unknown(skb, f->at + bytes, 0x7fff);
		if (proto == PROTO_FRAGMENT && (extension.rest & BIG_ENDIAN_16(0xfff8)))
			return PROTO_OPAQUE;
		/* A packet of more than 64 KiB has its length in an option that the kernel puts in for itself
		 * and takes out again before the wire. */
		if (proto == PROTO_HOPOPTS && jumbo &&
		    (extension.rest & BIG_ENDIAN_16(0xff00)) == BIG_ENDIAN_16(JUMBO_OPTION << 8))
			f->pseudo += bytes;
		proto = extension.next;
	}
	return is_extension(proto) ? PROTO_OPAQUE : proto;
}

INLINE u32 ipv6_dscp(const struct ipv6_start *ip)
{
	return ((ip->version_class & 15) << 2) | (ip->class_flow >> 6);
}

INLINE u32 ipv6(struct __sk_buff *skb, struct frame *f)
{
	struct ipv6_start ip;

	if (!fetch_ipv6(skb, f->at, &ip) || skb->len < f->at + IPV6_BYTES || ip.version_class >> 4 != 6)
		return PROTO_UNREADABLE;
	f->dscp = ipv6_dscp(&ip);
	f->network = f->at;
	f->version = 6;
	f->at += IPV6_BYTES;
	return extensions(skb, f, ip.next, !ip.length && skb->gso_size);
}

INLINE void transport(struct __sk_buff *skb, struct frame *f, u32 proto)
{
	u8 offset;
	u16 port;

	f->kind = KIND_IP;
	if (proto == PROTO_TCP) {
		f->kind = KIND_TCP;
		/* Only segments to come need to know how long the header is. */
		if (skb->gso_size && fetch_u8(skb, f->at + 12, &offset) && offset >> 4 > 5)
			f->at += (offset >> 4) * 4;
		else
			f->at += 20;
	} else if (proto == PROTO_UDP) {
		if (fetch_u16(skb, f->at + 2, &port) && port == BIG_ENDIAN_16(ROCE_PORT))
			f->kind = KIND_ROCE;
		f->at += 8;
	} else if (proto == PROTO_SCTP) {
		f->at += 12;
	}
}

/* What nearly all packets are, in a few instructions: TCP or UDP right behind a plain IP header, untagged and in
 * the linear part. Then kind and dscp are known, all that a packet needs that is no more than one on the wire. */
INLINE bool is_plain(struct __sk_buff *skb, struct frame *f)
{
	u8 *p = (u8 *)(long)skb->data, *end = (u8 *)(long)skb->data_end;
	struct ipv4_start *ip4 = (void *)(p + ETHERNET_BYTES);
	struct ipv6_start *ip6 = (void *)(p + ETHERNET_BYTES);
	u16 *ports;
	u8 proto;

	if (p + ETHERNET_BYTES + IPV4_BYTES + PORTS_BYTES > end || skb->vlan_present)
		return false;
	if (*(u16 *)(p + ETHERNET_BYTES - 2) == ETHERTYPE_IPV4 && ip4->version_length == 0x45 &&
	    !(ip4->fragment & BIG_ENDIAN_16(0x1fff))) {
		proto = ip4->proto;
		f->dscp = ip4->tos >> 2;
		ports = (void *)(p + ETHERNET_BYTES + IPV4_BYTES);
	} else if (*(u16 *)(p + ETHERNET_BYTES - 2) == ETHERTYPE_IPV6 && ip6->version_class >> 4 == 6 &&
		   p + ETHERNET_BYTES + IPV6_BYTES + PORTS_BYTES <= end) {
		proto = ip6->next;
		f->dscp = ipv6_dscp(ip6);
		ports = (void *)(p + ETHERNET_BYTES + IPV6_BYTES);
	} else {
		return false;
	}
	f->kind = proto == PROTO_TCP ? KIND_TCP : ports[1] == BIG_ENDIAN_16(ROCE_PORT) ? KIND_ROCE : KIND_IP;
	return proto == PROTO_TCP || proto == PROTO_UDP;
}

INLINE void dissect(struct __sk_buff *skb, struct frame *f, bool ipoib)
{
	u32 type = ipoib ? ipoib_layer(skb, f) : link_layer(skb, f), proto = PROTO_UNREADABLE;

	f->at = unknown(skb, f->at, 0xff);
	f->tagged = unknown(skb, f->tagged, 1);
	if (type == ETHERTYPE_IPV4)
		proto = ipv4(skb, f);
	else if (type == ETHERTYPE_IPV6)
		proto = ipv6(skb, f);
	f->network = unknown(skb, f->network, 0xff);
	f->version = unknown(skb, f->version, 7);
	f->dscp = unknown(skb, f->dscp, 63);
	if (proto != PROTO_UNREADABLE)
		transport(skb, f, proto);
}

/* Packets on the wire. gso_segs is 0 where the packet came from someone the kernel does not believe. */
INLINE u32 segments(const struct __sk_buff *skb, u32 payload)
{
	u32 size = skb->gso_size, segs;

	if (!size)
		return 1;
	segs = skb->gso_segs;
	if (!segs)
		segs = (payload + size - 1) / size;
	return segs ? segs : 1;
}

INLINE u32 class_of(const struct frame *f)
{
	const struct classes *classes = (void *)bpf_pseudo_fd(KND_PSEUDO_MAP_VALUE, KND_MAP_CLASSES);

	if (f->tagged && (classes->flags & CLASSES_PCP_WINS))
		return classes->pcp[bounded(f->pcp, 7)];
	return classes->dscp[bounded(f->dscp, 63)];
}

/* What a packet was counted as: one that stands for several has all of their headers in bytes. */
struct counted {
	u32 class;
	u64 bytes;
	u32 packets;
};

/* Adds without atomics: the record is this CPU's, and the hooks run with bottom halves off. */
INLINE void add(u32 slot, enum direction direction, u32 kind, const struct counted *counted)
{
	struct record *record;
	struct cell *cell;

	record = bpf_map_lookup_elem((void *)bpf_pseudo_fd(KND_PSEUDO_MAP_FD, KND_MAP_ACCT), &slot);
	if (!record)
		return;
	/* The whole index is masked: kernels before 6.2 know nothing of the sum of two bounded numbers that the
	 * compiler made an OR of. */
	cell = &record->cells[bounded((direction * KND_CLASSES + counted->class) * KND_KINDS + kind,
				      KND_DIRECTIONS * KND_CLASSES * KND_KINDS - 1)];
	cell->bytes += counted->bytes;
	cell->packets += counted->packets;
}

INLINE void measure(struct __sk_buff *skb, const struct frame *f, struct counted *counted)
{
	u32 length = skb->len + f->beside - f->pseudo, header = f->at + f->beside - f->pseudo;

	counted->packets = segments(skb, length > header ? length - header : 0);
	counted->bytes = length + (u64)(counted->packets - 1) * header;
}

#endif
