/** The pages that a user of the stand-in tenant sees in the browser. They need no script and fit a phone's width. */
import type { Application, User } from "./tenant-settings.ts";

/** Sign-in and consent in one, where Auth0 has a page for each. */
export function signInPage({ name }: Application, scopes: string[], users: User[], problem = ""): Response {
  const alert = problem && `<p id="problem" role="alert">${escapeHtml(problem)}</p>`;
  return page(
    "Log in",
    `<p><strong>${escapeHtml(name)}</strong> asks for access to your account.</p>
${alert}
<form method="post">
<label for="email">Email address</label>
<input id="email" name="email" type="email" list="users" autocomplete="username" required autofocus
  aria-describedby="${problem && "problem "}hint"${problem && ' aria-invalid="true"'}>
<datalist id="users">
${users.map(({ email }) => `<option value="${escapeAttribute(email)}">`).join("")}
</datalist>
<p id="hint">This stand-in tenant knows ${escapeHtml(users.map(({ email }) => email).join(" and "))}, and
needs no password.</p>
<p>${scopes.length > 0 ? "It will be allowed:" : "It asks for no scope."}</p>
<ul>${scopes.map((scope) => `<li>${escapeHtml(scope)}</li>`).join("")}</ul>
<button name="decision" value="accept">Accept</button>
<button name="decision" value="decline" formnovalidate>Decline</button>
</form>`,
    problem ? 400 : 200,
  );
}

export function errorPage(details: string, status: number): Response {
  return page("Oops!, something went wrong", `<p>${escapeHtml(details)}</p>`, status);
}

/** The visible text of a page, in one line. */
export function pageText(html: string): string {
  const [body = ""] = /<main>.*<\/main>/s.exec(html) ?? [];
  return body.replace(/<[^>]+>/g, " ").replace(/\s+/g, " ").trim()
    .replaceAll("&lt;", "<").replaceAll("&amp;", "&");
}

const STYLE = `
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { margin: 0; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
main { max-width: 28rem; margin: 0 auto; padding: 1.5rem 1rem; }
input, button { display: block; width: 100%; min-height: 3rem; padding: 0 .75rem; margin: .5rem 0; font: inherit; }
:focus-visible { outline: 3px solid; outline-offset: 3px; }
`;

function page(title: string, body: string, status: number): Response {
  const html = `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>${title}</title>
<style>${STYLE}</style>
</head>
<body><main><h1>${title}</h1>${body}</main></body>
</html>`;
  return new Response(html, { status, headers: { "content-type": "text/html; charset=utf-8" } });
}

/** For text between tags. */
function escapeHtml(value: string): string {
  return value.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

/** For an attribute that stands in double quotes. */
function escapeAttribute(value: string): string {
  return escapeHtml(value).replaceAll('"', "&quot;");
}
