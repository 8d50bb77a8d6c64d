/* The fake Messages upstream of .ci/bench: one thread, epoll, answers made once and sent again.
 *
 *   bench_upstream PIECES EVENTS_PER_CHUNK        prints "listening on http://127.0.0.1:PORT"
 *
 * PIECES: a file with one JSON-encoded text a line. Every POST is answered with a Messages event
 * stream whose text deltas are these pieces in turn; their number is the request's "max_tokens".
 * As Anthropic does, it pads the deltas with a varying number of spaces before the last brace.
 * GET /v1/models gets a small list, any other GET a 404. Listens on loopback only.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <signal.h>
#include <unistd.h>

enum { MAX_FD = 8192, MAX_DELTAS = 1000000 };

struct bytes { char *at; size_t len, room; };

struct answer { long deltas; struct bytes body; struct answer *next; };

struct client {
    struct bytes in;            /* what was received and not yet consumed */
    const char *head;           /* the answer being sent: head, then body */
    const char *body;
    size_t head_left, body_left;
    int busy, close_after, wants_write;
};

static struct client *clients[MAX_FD];
static struct answer *answers;
static char **pieces;
static size_t piece_count;
static long events_per_chunk;
static int poller;

/* What api.anthropic.com sends in front of a stream, in length and number of headers. */
#define STREAM_HEADERS \
    "Date: Sat, 21 Nov 2026 10:00:00 GMT\r\n" \
    "Content-Type: text/event-stream; charset=utf-8\r\n" \
    "Transfer-Encoding: chunked\r\n" \
    "Cache-Control: no-cache\r\n" \
    "anthropic-ratelimit-requests-limit: 4000\r\n" \
    "anthropic-ratelimit-requests-remaining: 3999\r\n" \
    "anthropic-ratelimit-requests-reset: 2026-11-21T10:00:01Z\r\n" \
    "anthropic-ratelimit-tokens-limit: 480000\r\n" \
    "anthropic-ratelimit-tokens-remaining: 480000\r\n" \
    "anthropic-ratelimit-tokens-reset: 2026-11-21T10:00:00Z\r\n" \
    "anthropic-organization-id: 00000000-0000-4000-8000-000000000000\r\n" \
    "request-id: req_011CbenchBenchBenchBench\r\n" \
    "strict-transport-security: max-age=31536000; includeSubDomains; preload\r\n" \
    "Server: cloudflare\r\n" \
    "CF-RAY: 0000000000000000-FRA\r\n"
static const char STREAM_KEPT[] = "HTTP/1.1 200 OK\r\n" STREAM_HEADERS "\r\n";
static const char STREAM_CLOSED[] =
    "HTTP/1.1 200 OK\r\n" STREAM_HEADERS "Connection: close\r\n\r\n";

#define YES "{\"supported\":true}"
static const char MODELS_BODY[] =
    "{\"data\":[{\"type\":\"model\",\"id\":\"claude-sonnet-5-5\","
    "\"display_name\":\"Claude Sonnet 5.5\",\"created_at\":\"2026-10-01T00:00:00Z\","
    "\"lifecycle\":\"active\",\"deprecated_at\":null,\"retires_at\":null,\"line\":\"sonnet\","
    "\"max_input_tokens\":1000000,\"max_tokens\":128000,\"capabilities\":{"
    "\"batch\":" YES ",\"citations\":" YES ",\"code_execution\":" YES ",\"image_input\":" YES ","
    "\"pdf_input\":" YES ",\"structured_outputs\":" YES ","
    "\"effort\":{\"supported\":true,\"low\":" YES ",\"medium\":" YES ",\"high\":" YES "},"
    "\"thinking\":{\"supported\":true,\"types\":{\"adaptive\":" YES ","
    "\"enabled\":{\"supported\":false},\"disabled\":{\"supported\":false}}}}}],"
    "\"has_more\":false,\"first_id\":\"claude-sonnet-5-5\",\"last_id\":\"claude-sonnet-5-5\"}";
static const char MISSING_BODY[] =
    "{\"type\":\"error\",\"error\":{\"type\":\"not_found_error\",\"message\":\"Not found\"}}";
static char models_head[512], missing_head[512];

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void append(struct bytes *to, const char *from, size_t len)
{
    if (to->len + len > to->room) {
        to->room = (to->len + len) * 2 + 1024;
        to->at = realloc(to->at, to->room);
        if (!to->at) die("memory");
    }
    memcpy(to->at + to->len, from, len);
    to->len += len;
}

static void add_chunk(struct bytes *body, struct bytes *events)
{
    char size[32];
    append(body, size, (size_t)sprintf(size, "%zx\r\n", events->len));
    append(body, events->at, events->len);
    append(body, "\r\n", 2);
    events->len = 0;
}

static void add_event(struct bytes *events, const char *name, const char *data)
{
    append(events, "event: ", 7);
    append(events, name, strlen(name));
    append(events, "\ndata: ", 7);
    append(events, data, strlen(data));
    append(events, "\n\n", 2);
}

static struct answer *answer_of(long deltas)
{
    for (struct answer *known = answers; known; known = known->next)
        if (known->deltas == deltas) return known;

    struct answer *made = calloc(1, sizeof *made);
    struct bytes events = {0};
    char data[4096];
    add_event(&events, "message_start",
        "{\"type\":\"message_start\",\"message\":{\"id\":\"msg_01BenchBenchBenchBenchBe\","
        "\"type\":\"message\",\"role\":\"assistant\",\"model\":\"claude-sonnet-5-5\","
        "\"content\":[],\"stop_reason\":null,\"stop_sequence\":null,\"usage\":{"
        "\"input_tokens\":8,\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":0,"
        "\"output_tokens\":1,\"service_tier\":\"standard\"}}}");
    add_event(&events, "content_block_start",
        "{\"type\":\"content_block_start\",\"index\":0,"
        "\"content_block\":{\"type\":\"text\",\"text\":\"\"}}");
    add_event(&events, "ping", "{\"type\":\"ping\"}");
    add_chunk(&made->body, &events);
    for (long i = 0; i < deltas; i++) {
        snprintf(data, sizeof data,
            "{\"type\":\"content_block_delta\",\"index\":0,"
            "\"delta\":{\"type\":\"text_delta\",\"text\":%s}%*s}",
            pieces[(size_t)i % piece_count], (int)(i * 7 % 13), "");
        add_event(&events, "content_block_delta", data);
        if ((i + 1) % events_per_chunk == 0) add_chunk(&made->body, &events);
    }
    if (events.len) add_chunk(&made->body, &events);
    add_event(&events, "content_block_stop", "{\"type\":\"content_block_stop\",\"index\":0}");
    snprintf(data, sizeof data,
        "{\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\","
        "\"stop_sequence\":null},\"usage\":{\"output_tokens\":%ld}}", deltas * 5);
    add_event(&events, "message_delta", data);
    add_event(&events, "message_stop", "{\"type\":\"message_stop\"}");
    add_chunk(&made->body, &events);
    append(&made->body, "0\r\n\r\n", 5);
    free(events.at);
    made->deltas = deltas;
    made->next = answers;
    answers = made;
    return made;
}

static void hang_up(int fd)
{
    free(clients[fd]->in.at);
    free(clients[fd]);
    clients[fd] = NULL;
    close(fd);
}

/* The value of a header in head[0..len), or NULL. */
static const char *header(const char *head, size_t len, const char *name)
{
    size_t name_len = strlen(name);
    const char *line = head, *end = head + len;
    while ((line = memchr(line, '\n', (size_t)(end - line)))) {
        line++;
        if ((size_t)(end - line) > name_len && line[name_len] == ':'
            && !strncasecmp(line, name, name_len))
            return line + name_len + 1 + strspn(line + name_len + 1, " \t");
    }
    return NULL;
}

/* Length of the chunked body at `at`, 0 when it is not all there yet. The first chunk's data is
 * what "max_tokens" is looked for in, so the body is not put together. */
static size_t chunked_len(const char *at, size_t len)
{
    size_t pos = 0;
    for (;;) {
        char *line_end = memmem(at + pos, len - pos, "\r\n", 2);
        if (!line_end) return 0;
        size_t size = strtoul(at + pos, NULL, 16);
        pos = (size_t)(line_end - at) + 2 + size + 2;
        if (pos > len) return 0;
        if (!size) return pos;
    }
}

/* Begins the next answer when a whole request is there; 0 when it is not, -1 when it is wrong. */
static int take_request(struct client *c)
{
    char *end = c->in.len ? memmem(c->in.at, c->in.len, "\r\n\r\n", 4) : NULL;
    if (!end) return 0;
    size_t head_len = (size_t)(end - c->in.at) + 4;
    const char *length = header(c->in.at, head_len, "content-length");
    const char *coding = header(c->in.at, head_len, "transfer-encoding");
    const char *connection = header(c->in.at, head_len, "connection");
    char *body = c->in.at + head_len;
    size_t body_len = 0, have = c->in.len - head_len;
    if (coding) {
        body_len = chunked_len(body, have);
        if (!body_len) return 0;
    } else if (length) {
        body_len = strtoul(length, NULL, 10);
        if (have < body_len) return 0;
    }
    c->close_after = connection && !strncasecmp(connection, "close", 5);
    if (!strncmp(c->in.at, "POST ", 5)) {
        static const char key[] = "\"max_tokens\":";
        char *limit = body_len ? memmem(body, body_len, key, sizeof key - 1) : NULL;
        long deltas = limit ? strtol(limit + sizeof key - 1, NULL, 10) : 0;
        if (deltas < 1 || deltas > MAX_DELTAS) {
            fprintf(stderr, "bench_upstream: a POST without a usable max_tokens\n");
            return -1;
        }
        struct answer *answer = answer_of(deltas);
        c->head = c->close_after ? STREAM_CLOSED : STREAM_KEPT;
        c->body = answer->body.at;
        c->body_left = answer->body.len;
    } else {
        int models = !!memmem(c->in.at, head_len, "/v1/models", 10);
        c->head = models ? models_head : missing_head;
        c->body = models ? MODELS_BODY : MISSING_BODY;
        c->body_left = strlen(c->body);
    }
    c->head_left = strlen(c->head);
    c->busy = 1;
    c->in.len -= head_len + body_len;
    memmove(c->in.at, body + body_len, c->in.len);
    return 1;
}

static void want_write(int fd, struct client *c, int wanted)
{
    if (c->wants_write == wanted) return;
    struct epoll_event event = {.events = EPOLLIN | (wanted ? EPOLLOUT : 0), .data.fd = fd};
    epoll_ctl(poller, EPOLL_CTL_MOD, fd, &event);
    c->wants_write = wanted;
}

/* Sends what is left of the answer; 1 when it is out, 0 when the socket is full, -1 on error. */
static int push(int fd, struct client *c)
{
    while (c->head_left + c->body_left) {
        struct iovec parts[2] = {
            {(void *)c->head, c->head_left}, {(void *)c->body, c->body_left}};
        ssize_t sent = writev(fd, parts, 2);
        if (sent < 0) {
            if (errno != EAGAIN) return -1;
            want_write(fd, c, 1);
            return 0;
        }
        size_t of_head = (size_t)sent < c->head_left ? (size_t)sent : c->head_left;
        c->head += of_head;
        c->head_left -= of_head;
        c->body += (size_t)sent - of_head;
        c->body_left -= (size_t)sent - of_head;
    }
    want_write(fd, c, 0);
    c->busy = 0;
    return c->close_after ? -1 : 1;
}

static void serve(int fd, unsigned events)
{
    static char buffer[1 << 18];
    struct client *c = clients[fd];
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
        ssize_t got = recv(fd, buffer, sizeof buffer, 0);
        if (got == 0 || (got < 0 && errno != EAGAIN)) {
            hang_up(fd);
            return;
        }
        if (got > 0) append(&c->in, buffer, (size_t)got);
    }
    for (;;) {
        if (!c->busy) {
            int taken = take_request(c);
            if (taken < 0) hang_up(fd);
            if (taken <= 0) return;
        }
        int sent = push(fd, c);
        if (sent < 0) hang_up(fd);
        if (sent <= 0) return;
    }
}

static void read_pieces(const char *path)
{
    FILE *file = fopen(path, "r");
    char *line = NULL;
    size_t room = 0;
    ssize_t len;
    if (!file) die(path);
    while ((len = getline(&line, &room, file)) > 0) {
        line[strcspn(line, "\n")] = 0;
        pieces = realloc(pieces, (piece_count + 1) * sizeof *pieces);
        pieces[piece_count++] = strdup(line);
    }
    free(line);
    fclose(file);
}

static int json_head(char *to, size_t room, const char *status, size_t body_len)
{
    return snprintf(to, room, "HTTP/1.1 %s\r\nContent-Type: application/json\r\n"
        "request-id: req_011CbenchBenchBenchBench\r\nContent-Length: %zu\r\n\r\n",
        status, body_len);
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: bench_upstream PIECES EVENTS_PER_CHUNK\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGPIPE, SIG_IGN);
    read_pieces(argv[1]);
    events_per_chunk = atol(argv[2]);
    if (!piece_count || events_per_chunk < 1) return 2;
    json_head(models_head, sizeof models_head, "200 OK", strlen(MODELS_BODY));
    json_head(missing_head, sizeof missing_head, "404 Not Found", strlen(MISSING_BODY));

    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t address_len = sizeof address;
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address)) die("bind");
    if (listen(listener, 4096)) die("listen");
    getsockname(listener, (struct sockaddr *)&address, &address_len);
    printf("listening on http://127.0.0.1:%d\n", ntohs(address.sin_port));
    fflush(stdout);

    poller = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, ready[256];
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int count = epoll_wait(poller, ready, 256, -1);
        for (int i = 0; i < count; i++) {
            int fd = ready[i].data.fd;
            if (fd != listener) {
                serve(fd, ready[i].events);
                continue;
            }
            while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                if (fd >= MAX_FD) {
                    close(fd);
                    continue;
                }
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                clients[fd] = calloc(1, sizeof **clients);
                event = (struct epoll_event){.events = EPOLLIN, .data.fd = fd};
                epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
            }
        }
    }
}
