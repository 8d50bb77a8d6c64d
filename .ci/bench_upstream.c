/* The fake Messages upstream of .ci/bench: one thread, epoll, answers made once and sent again.
 *
 *   bench_upstream PORT PIECES EVENTS_PER_CHUNK
 *
 * PIECES: a file with one JSON-encoded text a line. Every POST is answered with a Messages event
 * stream whose text deltas are these pieces in turn; their number is the request's "max_tokens".
 * One that asks for no stream (other gateways do, ours does not) gets the same as one message.
 * As Anthropic does, it pads the deltas with a varying number of spaces before the last brace.
 * A request that says "pace=MS" (in a short prompt, so that any gateway hands it on) gets its
 * deltas one by one, each MS milliseconds, as a model writes them. Each then ends in a space and
 * the time it was made: 16 digits, microseconds of CLOCK_MONOTONIC. GET /stop lets them all end.
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
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FD = 8192, MAX_DELTAS = 1000000, MAX_PACED = 4096 };

struct bytes { char *at; size_t len, room; };

struct answer { long deltas; int streamed; struct bytes body; struct answer *next; };

struct client {
    struct bytes in;            /* what was received and not yet consumed */
    const char *head;           /* the answer being sent: head, then body */
    const char *body;
    size_t head_left, body_left;
    int busy, close_after, wants_write;
    /* A paced answer: */
    struct bytes out;           /* what `body` points into */
    long paced, written;        /* deltas, in all and so far */
    double pace, due;           /* seconds; when the next one is due */
};

static struct client *clients[MAX_FD];
static struct answer *answers;
static char **pieces;
static size_t piece_count;
static long events_per_chunk;
static int poller, timer;
static struct turn { double due; int fd; } waiting[MAX_FD * 2];
static size_t waiting_count;

/* What api.anthropic.com sends in front of an answer, in length and number of headers. */
#define HEAD(type, more) \
    "HTTP/1.1 200 OK\r\n" \
    "Date: Sat, 21 Nov 2026 10:00:00 GMT\r\n" \
    "Content-Type: " type "\r\n" \
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
    "CF-RAY: 0000000000000000-FRA\r\n" more "\r\n"
#define CLOSE "Connection: close\r\n"
#define EVENT_STREAM "text/event-stream; charset=utf-8"
static const char *const HEADS[2][2] = {        /* [streamed][close_after] */
    {HEAD("application/json", ""), HEAD("application/json", CLOSE)},
    {HEAD(EVENT_STREAM, ""), HEAD(EVENT_STREAM, CLOSE)},
};

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

#define MESSAGE "\"id\":\"msg_01BenchBenchBenchBenchBe\",\"type\":\"message\"," \
    "\"role\":\"assistant\",\"model\":\"claude-sonnet-5-5\","

static void add_opening(struct bytes *events)
{
    add_event(events, "message_start",
        "{\"type\":\"message_start\",\"message\":{" MESSAGE
        "\"content\":[],\"stop_reason\":null,\"stop_sequence\":null,\"usage\":{"
        "\"input_tokens\":8,\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":0,"
        "\"output_tokens\":1,\"service_tier\":\"standard\"}}}");
    add_event(events, "content_block_start",
        "{\"type\":\"content_block_start\",\"index\":0,"
        "\"content_block\":{\"type\":\"text\",\"text\":\"\"}}");
    add_event(events, "ping", "{\"type\":\"ping\"}");
}

/* The delta of that number; with a `stamp` at the end of its text, or "". */
static void add_delta(struct bytes *events, long number, const char *stamp)
{
    char data[4096];
    const char *piece = pieces[(size_t)number % piece_count];
    snprintf(data, sizeof data,
        "{\"type\":\"content_block_delta\",\"index\":0,"
        "\"delta\":{\"type\":\"text_delta\",\"text\":%.*s%s\"}%*s}",
        (int)strlen(piece) - 1, piece, stamp, (int)(number * 7 % 13), "");
    add_event(events, "content_block_delta", data);
}

/* The end of an answer of so many deltas, and of its body. */
static void add_closing(struct bytes *body, struct bytes *events, long deltas)
{
    char data[256];
    add_event(events, "content_block_stop", "{\"type\":\"content_block_stop\",\"index\":0}");
    snprintf(data, sizeof data,
        "{\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\","
        "\"stop_sequence\":null},\"usage\":{\"output_tokens\":%ld}}", deltas * 5);
    add_event(events, "message_delta", data);
    add_event(events, "message_stop", "{\"type\":\"message_stop\"}");
    add_chunk(body, events);
    append(body, "0\r\n\r\n", 5);
}

static void add_whole(struct bytes *body, long deltas)
{
    static const char begin[] = "{" MESSAGE "\"content\":[{\"type\":\"text\",\"text\":\"";
    struct bytes whole = {0};
    char end[256];
    append(&whole, begin, sizeof begin - 1);
    for (long i = 0; i < deltas; i++) {
        const char *piece = pieces[(size_t)i % piece_count];
        append(&whole, piece + 1, strlen(piece) - 2);
    }
    append(&whole, end, (size_t)sprintf(end, "\"}],\"stop_reason\":\"end_turn\","
        "\"stop_sequence\":null,\"usage\":{\"input_tokens\":8,\"output_tokens\":%ld}}",
        deltas * 5));
    add_chunk(body, &whole);
    append(body, "0\r\n\r\n", 5);
    free(whole.at);
}

static void add_stream(struct bytes *body, long deltas)
{
    struct bytes events = {0};
    add_opening(&events);
    add_chunk(body, &events);
    for (long i = 0; i < deltas; i++) {
        add_delta(&events, i, "");
        if ((i + 1) % events_per_chunk == 0) add_chunk(body, &events);
    }
    if (events.len) add_chunk(body, &events);
    add_closing(body, &events, deltas);
    free(events.at);
}

static struct answer *answer_of(long deltas, int streamed)
{
    for (struct answer *known = answers; known; known = known->next)
        if (known->deltas == deltas && known->streamed == streamed) return known;

    struct answer *made = calloc(1, sizeof *made);
    *made = (struct answer){.deltas = deltas, .streamed = streamed, .next = answers};
    (streamed ? add_stream : add_whole)(&made->body, deltas);
    return answers = made;
}

/* ---- paced answers ------------------------------------------------------------------------- */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Puts the client into the heap of those that wait; the one that is due first is at waiting[1]. */
static void wait_for(int fd, double due)
{
    size_t at = ++waiting_count;
    for (; at > 1 && waiting[at / 2].due > due; at /= 2) waiting[at] = waiting[at / 2];
    waiting[at] = (struct turn){due, fd};
    clients[fd]->due = due;
}

static struct turn take_first(void)
{
    struct turn first = waiting[1], last = waiting[waiting_count--];
    size_t at = 1, child;
    for (; (child = at * 2) <= waiting_count; at = child) {
        if (child < waiting_count && waiting[child + 1].due < waiting[child].due) child++;
        if (waiting[child].due >= last.due) break;
        waiting[at] = waiting[child];
    }
    waiting[at] = last;
    return first;
}

/* Adds the next delta to what is being sent, and the end behind the last one. */
static void write_delta(struct client *c)
{
    static struct bytes events;
    char stamp[32];
    size_t sent = c->body_left ? (size_t)(c->body - c->out.at) : c->out.len;
    memmove(c->out.at, c->out.at + sent, c->out.len -= sent);
    if (!c->written) {
        add_opening(&events);
        add_chunk(&c->out, &events);
    }
    sprintf(stamp, " %016.0f", now() * 1e6);
    add_delta(&events, c->written, stamp);
    add_chunk(&c->out, &events);
    if (++c->written == c->paced) add_closing(&c->out, &events, c->paced);
    c->body = c->out.at;
    c->body_left = c->out.len;
}

static void stop_paced(void)
{
    for (int fd = 0; fd < MAX_FD; fd++)
        if (clients[fd] && clients[fd]->written < clients[fd]->paced)
            clients[fd]->paced = clients[fd]->written + 1;
}

static void hang_up(int fd)
{
    free(clients[fd]->in.at);
    free(clients[fd]->out.at);
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

/* What stands behind `key` in a body: looked for at both ends first, since it may be long. */
static const char *behind(const char *body, size_t len, const char *key)
{
    enum { NEAR = 4096 };
    size_t key_len = strlen(key), near = len < NEAR ? len : NEAR;
    const char *at = memmem(body, near, key, key_len);
    if (!at) at = memmem(body + len - near, near, key, key_len);
    if (!at) at = memmem(body, len, key, key_len);
    return at ? at + key_len : NULL;
}

/* Begins the next answer when a whole request is there; 0 when it is not, -1 when it is wrong. */
static int take_request(int fd, struct client *c)
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
        const char *limit = behind(body, body_len, "\"max_tokens\":");
        const char *pace = body_len < MAX_PACED ? behind(body, body_len, "pace=") : NULL;
        long deltas = limit ? strtol(limit, NULL, 10) : 0;
        if (deltas < 1 || deltas > MAX_DELTAS) {
            fprintf(stderr, "bench_upstream: a POST without a usable max_tokens\n");
            return -1;
        }
        const char *stream = behind(body, body_len, "\"stream\":");
        int streamed = stream && !strncmp(stream + strspn(stream, " "), "true", 4);
        c->head = HEADS[streamed][c->close_after];
        if (pace) {
            c->pace = strtod(pace, NULL) / 1e3;
            c->paced = deltas;
            c->written = 0;
            write_delta(c);
            if (c->written < c->paced) wait_for(fd, now() + c->pace);
        } else {
            struct answer *answer = answer_of(deltas, streamed);
            c->body = answer->body.at;
            c->body_left = answer->body.len;
        }
    } else {
        if (!strncmp(c->in.at, "GET /stop ", 10)) stop_paced();
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
    if (c->written < c->paced) return 0;
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
            int taken = take_request(fd, c);
            if (taken < 0) hang_up(fd);
            if (taken <= 0) return;
        }
        int sent = push(fd, c);
        if (sent < 0) hang_up(fd);
        if (sent <= 0) return;
    }
}

/* Writes what has come due, and sets the timer for what comes next. */
static void write_due(void)
{
    static double set;
    while (waiting_count && waiting[1].due <= now()) {
        struct turn turn = take_first();
        struct client *c = clients[turn.fd];
        if (!c || c->due != turn.due) continue;     /* hung up meanwhile */
        write_delta(c);
        if (c->written < c->paced) wait_for(turn.fd, turn.due + c->pace);
        if (push(turn.fd, c) < 0) hang_up(turn.fd);
    }
    double next = waiting_count ? waiting[1].due : 0;
    if (next == set) return;
    time_t seconds = (time_t)next;
    struct itimerspec at = {.it_value = {seconds, (long)((next - (double)seconds) * 1e9)}};
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
    set = next;
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
    if (argc != 4) {
        fprintf(stderr, "usage: bench_upstream PORT PIECES EVENTS_PER_CHUNK\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGPIPE, SIG_IGN);
    read_pieces(argv[2]);
    events_per_chunk = atol(argv[3]);
    if (!piece_count || events_per_chunk < 1) return 2;
    json_head(models_head, sizeof models_head, "200 OK", strlen(MODELS_BODY));
    json_head(missing_head, sizeof missing_head, "404 Not Found", strlen(MISSING_BODY));

    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1])),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address)) die("bind");
    if (listen(listener, 4096)) die("listen");

    poller = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, ready[256];
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    event.data.fd = timer;
    epoll_ctl(poller, EPOLL_CTL_ADD, timer, &event);
    for (;;) {
        int count = epoll_wait(poller, ready, 256, -1);
        for (int i = 0; i < count; i++) {
            int fd = ready[i].data.fd;
            if (fd == timer) continue;
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
        write_due();
    }
}
