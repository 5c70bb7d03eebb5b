// SPDX-License-Identifier: Apache-2.0
/* The one program of the cluster's tool image, and the first process of a simulated node.
 *
 *   knd-tool sleep                                  wait; reap; end at once on TERM or INT
 *   knd-tool send ADDR PORT COUNT SIZE DSCP [RATE]  exactly COUNT datagrams with SIZE bytes of data
 *   knd-tool sink PORT [COUNT]                      count what comes, until TERM or COUNT datagrams
 *
 * Each says one line of `key=value` words at its end; 1: the system refused, 2: wrong usage.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LARGEST 65507

static volatile sig_atomic_t ended;

static void on_end(int number)
{
	(void)number;
	ended = 1;
}

static void on_child(int number)
{
	int kept = errno;

	(void)number;
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
	errno = kept;
}

static void handle(int number, void (*handler)(int))
{
	struct sigaction action = {.sa_handler = handler};

	/* No SA_RESTART: a blocked recv() has to come back. */
	sigaction(number, &action, NULL);
}

__attribute__((format(printf, 2, 3))) static int failed(int code, const char *format, ...)
{
	va_list values;

	va_start(values, format);
	fputs("knd-tool: ", stderr);
	vfprintf(stderr, format, values);
	fputc('\n', stderr);
	va_end(values);
	return code;
}

/* A whole decimal number within the bounds, or -1. */
static long number_of(const char *text, long least, long most)
{
	char *end;
	long value;

	errno = 0;
	value = strtol(text, &end, 10);
	return errno || end == text || *end || value < least || value > most ? -1 : value;
}

static int sleep_until_told(void)
{
	sigset_t blocked, before;

	/* Blocked but while waiting: a TERM just before the wait would be lost. */
	sigfillset(&blocked);
	sigprocmask(SIG_BLOCK, &blocked, &before);
	handle(SIGCHLD, on_child);
	/* Children that ended before there was a handler: what ran as this process before exec had them. */
	on_child(SIGCHLD);
	while (!ended)
		sigsuspend(&before);
	return 0;
}

static void pace(const struct timespec *start, long sent, long rate)
{
	struct timespec until = *start;

	until.tv_sec += sent / rate;
	until.tv_nsec += sent % rate * (1000000000L / rate);
	if (until.tv_nsec >= 1000000000L) {
		until.tv_sec += until.tv_nsec / 1000000000L;
		until.tv_nsec %= 1000000000L;
	}
	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
}

static socklen_t target(const char *text, long port, struct sockaddr_storage *to)
{
	struct sockaddr_in *four = (struct sockaddr_in *)to;
	struct sockaddr_in6 *six = (struct sockaddr_in6 *)to;

	memset(to, 0, sizeof(*to));
	if (inet_pton(AF_INET, text, &four->sin_addr) == 1) {
		four->sin_family = AF_INET;
		four->sin_port = htons(port);
		return sizeof(*four);
	}
	if (inet_pton(AF_INET6, text, &six->sin6_addr) == 1) {
		six->sin6_family = AF_INET6;
		six->sin6_port = htons(port);
		return sizeof(*six);
	}
	return 0;
}

static int open_sender(const struct sockaddr_storage *to, socklen_t length, int dscp)
{
	int class = dscp << 2;
	int fd = socket(to->ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return -1;
	if (to->ss_family == AF_INET6
		    ? setsockopt(fd, IPPROTO_IPV6, IPV6_TCLASS, &class, sizeof(class))
		    : setsockopt(fd, IPPROTO_IP, IP_TOS, &class, sizeof(class)))
		return -1;
	/* Connected: a refusal by the network is then an error of a later send, never a silent loss. */
	return connect(fd, (const struct sockaddr *)to, length) ? -1 : fd;
}

static int send_all(char **args, int count_of_args)
{
	static char data[LARGEST];
	struct sockaddr_storage to;
	struct timespec start;
	socklen_t length;
	long port = number_of(args[1], 1, 65535), count = number_of(args[2], 1, 1000000000L);
	long size = number_of(args[3], 1, LARGEST), dscp = number_of(args[4], 0, 63);
	long rate = count_of_args > 5 ? number_of(args[5], 1, 100000000L) : 0, sent;
	int fd;

	if (port < 0 || count < 0 || size < 0 || dscp < 0 || rate < 0)
		return failed(2, "a number is missing its bounds: PORT 1-65535, COUNT from 1, SIZE 1-%d, DSCP 0-63, "
				 "RATE (datagrams a second) from 1",
			      LARGEST);
	length = target(args[0], port, &to);
	if (!length)
		return failed(2, "%s is no IPv4 or IPv6 address", args[0]);
	fd = open_sender(&to, length, dscp);
	if (fd < 0)
		return failed(1, "reaching %s: %s", args[0], strerror(errno));
	memset(data, 'k', size);
	clock_gettime(CLOCK_MONOTONIC, &start);
	for (sent = 0; sent < count && !ended; sent++) {
		if (rate)
			pace(&start, sent, rate);
		if (ended)
			break;
		while (send(fd, data, size, 0) < 0) {
			/* Nobody listens: the frame before was sent all the same, this one was not yet. */
			if (errno != ECONNREFUSED && errno != EINTR)
				return failed(1, "sending datagram %ld of %ld to %s: %s", sent + 1, count, args[0],
					      strerror(errno));
		}
	}
	printf("sent=%ld bytes=%ld\n", sent, sent * size);
	return sent == count ? 0 : 1;
}

static int sink(char **args, int count_of_args)
{
	static char data[LARGEST];
	struct sockaddr_in6 any = {.sin6_family = AF_INET6};
	struct sockaddr_in any_four = {.sin_family = AF_INET};
	long port = number_of(args[0], 1, 65535), wanted = 0, got = 0, bytes = 0;
	int off = 0, space = 8 << 20, fd;
	ssize_t size;

	if (count_of_args > 1)
		wanted = number_of(args[1], 1, 1000000000L);
	if (port < 0 || wanted < 0)
		return failed(2, "PORT is 1-65535, COUNT at least 1");
	any.sin6_port = any_four.sin_port = htons(port);
	fd = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd >= 0) {
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
		if (bind(fd, (struct sockaddr *)&any, sizeof(any)))
			return failed(1, "listening on port %ld: %s", port, strerror(errno));
	} else {
		/* A kernel without IPv6. */
		fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
		if (fd < 0 || bind(fd, (struct sockaddr *)&any_four, sizeof(any_four)))
			return failed(1, "listening on port %ld: %s", port, strerror(errno));
	}
	/* As much as allowed: what overflows here is lost and no fault of the network. */
	if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &space, sizeof(space)))
		setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &space, sizeof(space));
	printf("listening port=%ld\n", port);
	fflush(stdout);
	while (!ended && (!wanted || got < wanted)) {
		size = recv(fd, data, sizeof(data), 0);
		if (size < 0 && errno != EINTR)
			return failed(1, "receiving: %s", strerror(errno));
		if (size >= 0) {
			got++;
			bytes += size;
		}
	}
	printf("received=%ld bytes=%ld\n", got, bytes);
	return !wanted || got == wanted ? 0 : 1;
}

int main(int count, char **args)
{
	handle(SIGTERM, on_end);
	handle(SIGINT, on_end);
	if (count == 2 && !strcmp(args[1], "sleep"))
		return sleep_until_told();
	if ((count == 7 || count == 8) && !strcmp(args[1], "send"))
		return send_all(args + 2, count - 2);
	if ((count == 3 || count == 4) && !strcmp(args[1], "sink"))
		return sink(args + 2, count - 2);
	return failed(2, "usage: knd-tool sleep | send ADDR PORT COUNT SIZE DSCP [RATE] | sink PORT [COUNT]");
}
